// Data of the page, and how it says numbers and names. See the module `packing` for the form in which data travels.

const byId = (id) => document.getElementById(id);

const inflate = async (id) => {
  const text = byId(id).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const raw = atob(text);
    bytes = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at += 1) bytes[at] = raw.charCodeAt(at);
  }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
};
const inflateJson = async (id) => unpack(JSON.parse(await inflate(id)))[0];

// Undo the columns of the module `packing`: return the values of a column.
const unpack = ([kind, first, ...rest]) => {
  if (kind === "number") return first;
  if (kind === "null") return new Array(first).fill(null);
  if (kind === "flag") return [...first].map((one) => one === "1");
  if (kind === "text") return rest[0].map((index) => first[index]);
  if (kind === "list") {
    const items = unpack(rest[0]);
    let at = 0;
    return first.map((length) => items.slice(at, (at += length)));
  }
  if (kind === "mixed") {
    const parts = first.map(unpack);
    const next = parts.map(() => 0);
    return rest[0].map((part) => parts[part][next[part]++]);
  }
  if (kind === "empty") return Array.from({ length: first }, () => ({}));
  const columns = rest.map(unpack);
  return columns[0].map((_, row) => Object.fromEntries(first.map((key, column) => [key, columns[column][row]])));
};

// The rest of each product. The speed-up of a kernel is that of the chosen one, by the ratio of their times.
const readDetails = async (sites) => {
  const details = await inflateJson("details");
  details.forEach(({ kernels }, at) => {
    const chosen = kernels.find((kernel) => kernel.status === "chosen");
    const baseline = chosen?.time_us && sites[at].speed !== null ? chosen.time_us * sites[at].speed : null;
    for (const kernel of kernels)
      kernel.speedup = baseline === null || !kernel.time_us ? null : Number((baseline / kernel.time_us).toPrecision(6));
  });
  return details;
};

// The levels of a histogram from their text, as the module `levels` writes them.
const levelsOf = (text) => {
  let level = 0;
  return [...text].map((one) => {
    if (one === " ") return null;
    const code = one.charCodeAt(0);
    return (level += 75 - (code > 256 ? code - 512 : code));
  });
};

// Histories by site and pass, histograms by site and role, as Python keeps them.
const readMaterial = async () => {
  const material = await inflateJson("material");
  const nested = (entries, key, list, name, value) => {
    const bySite = Object.create(null);
    for (const entry of entries) {
      bySite[entry.site] ??= Object.create(null);
      bySite[entry.site][entry[key]] = {
        ...entry,
        [list]: Object.fromEntries(entry[list].map((one) => [one[name], one[value]])),
      };
    }
    return bySite;
  };
  const histories = nested(material.histories, "pass", "recipes", "recipe", "errors");
  return { ...material, histories, histograms: nested(material.histograms, "role", "groups", "group", "levels") };
};

// Nothing that a name holds may act: what is not printable is spelled out, and Plotly's texts are escaped as HTML.
const visible = (text) =>
  String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => "\\u" + char.codePointAt(0).toString(16).padStart(4, "0"));
const forPlotly = (text) =>
  visible(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
const siteName = (site) => site || "(root)";
// What tells sites apart, numbers and the leaf, goes last.
const short = (name, width) => {
  const parts = name.split(".");
  for (let at = 0; at < parts.length - 1 && parts.join(".").length > width; at += 1)
    if (!/^\d+$/.test(parts[at])) parts[at] = parts[at].slice(0, 1);
  const text = parts.join(".");
  if (text.length <= width) return text;
  const head = Math.floor((width - 1) / 2);
  return text.slice(0, head) + "\u2026" + text.slice(text.length - (width - 1 - head));
};

// Numbers: null is unknown, unless the report says that it was infinite.
const measured = (recipe, path) => {
  if (recipe.infinite.includes(path)) return Infinity;
  return path.split(".").reduce((value, key) => value[key], recipe);
};
const show = (value, digits = 3) => {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return "inf";
  const small = value !== 0 && Math.abs(value) < 1e-4;
  return small ? String(Number(value.toPrecision(digits)).toExponential()) : String(Number(value.toPrecision(digits)));
};
const percent = (value) => (value === null || value === undefined ? "-" : show(100 * value) + " %");
const times = (value) => (value === null || value === undefined ? "-" : value.toFixed(2) + "x");
const best = (site) => site.recipes.find((recipe) => recipe.recipe === site.best);
// The most that the error of a product may be, whatever the bound is written in.
const most = (site) => (site.bound.metric === "sqnr_db" ? 10 ** (-site.bound.value / 20) : site.bound.value);

const element = (name, text, className) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = visible(text);
  if (className) node.className = className;
  return node;
};

// A column is [header, value of an entry, class of its cells]; a value may be a node.
const grid = (columns, entries, label, classOf) => {
  const box = element("div", undefined, "scroll");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  const made = box.appendChild(element("table"));
  const header = made.createTHead().insertRow();
  for (const [name, , className] of columns) {
    const cell = element("th", name, className);
    cell.scope = "col";
    header.append(cell);
  }
  const rows = made.createTBody();
  for (const entry of entries) {
    const row = rows.insertRow();
    if (classOf) row.className = classOf(entry);
    for (const [, value, className] of columns) {
      const content = value(entry);
      const cell = element("td", content instanceof Node ? undefined : content, className);
      if (content instanceof Node) cell.append(content);
      row.append(cell);
    }
  }
  return box;
};

const radios = (fieldset, name, options, onChange) => {
  const legend = fieldset.querySelector("legend");
  fieldset.replaceChildren(legend);
  options.forEach((option, index) => {
    const label = element("label");
    const input = label.appendChild(element("input"));
    Object.assign(input, { type: "radio", name, value: option, checked: index === 0 });
    input.addEventListener("change", () => onChange(option));
    label.append(option);
    fieldset.append(label);
  });
  fieldset.hidden = options.length < 2;
};
