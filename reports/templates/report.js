"use strict";
(() => {
  const table = document.getElementById("products");
  if (!table) return;
  const body = table.tBodies[0];
  const packed = JSON.parse(document.getElementById("report").textContent);

  // See the module html_report for the packing.
  const open = (value) => {
    if (typeof value === "string") return packed.strings[parseInt(value, 36)];
    if (!Array.isArray(value)) return value;
    const items = value.slice(1).map(open);
    if (value[0] < 0) return items;
    return Object.fromEntries(packed.shapes[value[0]].map((key, index) => [key, items[index]]));
  };
  const sites = open(packed.sites);
  const best = (site) => site.recipes.find((recipe) => recipe.recipe === site.best);
  const hasLoss = sites.some((site) => site.recipes.some((recipe) => recipe.loss));
  const lossCells = hasLoss ? ["kl", ...(packed.bound.loss === null ? [] : ["cost"])] : [];
  const chosen = (site) => site.kernels.find((kernel) => kernel.status === "chosen");

  // Numbers: null is unknown, unless the report says that it was infinite.
  const measured = (recipe, path) => {
    if (recipe.infinite.includes(path)) return Infinity;
    return path.split(".").reduce((value, key) => value[key], recipe);
  };
  const show = (value, digits = 3) => {
    if (value === null || value === undefined) return "-";
    if (typeof value !== "number") return String(value);
    return Number.isFinite(value) ? String(Number(value.toPrecision(digits))) : "inf";
  };
  const percent = (value) => (value === null || value === undefined ? "-" : show(100 * value) + " %");
  const visible = (text) => String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => "\\u" + char.codePointAt(0).toString(16).padStart(4, "0"));

  const element = (name, text, className) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = visible(text);
    if (className) node.className = className;
    return node;
  };

  // A column is [header, value of an entry, class of its cells]; a value may be a node.
  const grid = (parent, title, columns, entries, classOf) => {
    if (!entries.length) return;
    parent.append(element("h3", title));
    const made = element("table");
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
    parent.append(made);
  };

  const number = (name, path, digits) => [name, (recipe) => show(measured(recipe, path), digits), "number"];
  // What a recipe of a forward product does to the loss, relative to it.
  const ofLoss = (name, key) => [name, (recipe) => show(recipe.loss?.[key] ?? null), "number"];
  const lossColumns = [
    ofLoss("kl", "kl"), ofLoss("kl high", "kl_high"), ofLoss("cost", "cost"), ofLoss("first order", "first_order"),
    ofLoss("loss low", "low"), ofLoss("loss high", "high"), ofLoss("loss samples", "samples"), ofLoss("labels", "labels"),
  ];
  const recipeColumns = [
    ["recipe", (recipe) => recipe.recipe],
    ["format", (recipe) => recipe.format],
    ["verdict", (recipe) => element("span", recipe.verdict, "mark " + recipe.verdict)],
    ["samples", (recipe) => recipe.n, "number"],
    ["decided by", (recipe) => recipe.gate],
    number("mean", "row_error.mean"), number("low", "row_error.low"), number("high", "row_error.high"),
    number("p99 of rows", "row_error.p99"), number("upper", "row_error.upper_tolerance"),
    number("relative_error", "relative_error"), number("SQNR [dB]", "sqnr_db"),
    ["SQNR at least [dB]", (recipe) => show(recipe.sqnr_low_db), "number"], number("MERE", "mere"),
    number("bias", "bias"),
    ...(hasLoss ? lossColumns : []),
    ["horizon [steps]", (recipe) => recipe.horizon ?? "frozen weights", "number"],
    ["drift per 100 steps", (recipe) => recipe.drift ? percent(recipe.drift.per_100_steps) : "-", "number"],
    ["crosses the bound at step", (recipe) => recipe.drift ? show(recipe.drift.crosses_at, 6) : "-", "number"],
    ["note", (recipe) => recipe.note, "words"],
  ];
  const kernelColumns = [
    ["kernel", (kernel) => kernel.kernel],
    ["status", (kernel) => kernel.status],
    ["time [us]", (kernel) => show(kernel.time_us), "number"],
    ["speed", (kernel) => (kernel.speedup === null ? "-" : kernel.speedup.toFixed(2) + "x"), "number"],
    ["upper", (kernel) => show(kernel.error_upper), "number"],
    ...(hasLoss ? [["costs the loss", (kernel) => show(kernel.loss_cost), "number"]] : []),
    ["reason", (kernel) => kernel.reason, "words"],
  ];
  const operandColumns = (recipes) => [
    ["operand", ([role]) => role],
    ["amax", ([, operand]) => show(operand.amax), "number"],
    ["rms", ([, operand]) => show(operand.rms), "number"],
    ["zeros", ([, operand]) => percent(operand.zeros), "number"],
    ["NaN", ([, operand]) => operand.nan, "number"],
    ["Inf", ([, operand]) => operand.inf, "number"],
    ...recipes.flatMap((recipe) => [
      [recipe + " underflow", ([, operand]) => percent(operand.underflow[recipe]), "number"],
      [recipe + " saturation", ([, operand]) => percent(operand.saturation[recipe]), "number"],
    ]),
    ["note", ([, operand]) => operand.note, "words"],
  ];

  const details = (site) => {
    const row = element("tr", undefined, "detail");
    const whole = row.appendChild(element("td"));
    whole.colSpan = table.tHead.rows[0].cells.length;
    const box = whole.appendChild(element("div"));
    const rows = site.m_min === site.m_max ? "" : `, m from ${site.m_min} to ${site.m_max}`;
    const parameter = site.parameter ? `, parameter ${site.parameter}` : "";
    box.append(element("p", `${site.op}, ${site.dtype}, ${show(site.calls)} calls per step${rows}${parameter}`));
    if (site.bound) box.append(element("p", `held to the bound ${site.bound.text} on ${site.bound.metric}`));
    if (site.reason) box.append(element("p", `${site.verdict}: ${site.reason}`));
    const operands = Object.entries(site.operands);
    const named = new Set(operands.flatMap(([, operand]) => Object.keys(operand.underflow)));
    grid(box, "Recipes", recipeColumns, site.recipes);
    grid(box, "Operands", operandColumns([...named]), operands);
    grid(box, "Kernels", kernelColumns, site.kernels, (kernel) => kernel.status);
    return row;
  };

  const error = (key) => (site) => (best(site) ? measured(best(site), "row_error." + key) : null);
  const keys = [
    (site) => site.site, (site) => site.pass, (site) => site.flops, (site) => site.flop_share, (site) => site.best,
    error("mean"), error("upper_tolerance"),
    ...lossCells.map((name) => (site) => best(site)?.loss?.[name] ?? null),
    (site) => ["unsafe", "undecided", "safe"].indexOf(site.verdict),
    ...(packed.bound.per_site?.length ? [(site) => site.bound.text] : []),
    (site) => site.chosen, (site) => (chosen(site) ? chosen(site).speedup : null),
  ];

  const records = [...body.rows].map((row) => {
    const site = sites[Number(row.id.slice(1))];
    const words = [site.site, site.best, site.chosen, site.op].join(" ").toLowerCase();
    return { row, site, words, detail: null, values: keys.map((key) => key(site)) };
  });
  const byRow = new Map(records.map((record) => [record.row, record]));

  for (const { row } of records) {
    const button = element("button", row.cells[0].textContent);
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    row.cells[0].replaceChildren(button);
  }

  body.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    const record = button && byRow.get(button.closest("tr"));
    if (!record) return;
    const expand = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(expand));
    if (expand) record.row.after((record.detail = details(record.site)));
    else {
      record.detail.remove();
      record.detail = null;
    }
  });

  // Unknown values come last in both directions; equal ones keep their order.
  const compare = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  };
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, index) => {
    const button = element("button", header.textContent);
    button.type = "button";
    header.replaceChildren(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      records.sort((a, b) => compare(a.values[index], b.values[index], ascending ? 1 : -1));
      body.replaceChildren(...records.flatMap(({ row, detail }) => (detail ? [row, detail] : [row])));
    });
  });

  const [text, verdict, pass, count] = ["text", "verdict", "pass", "count"].map((id) => document.getElementById(id));
  const filter = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const { row, site, words, detail } of records) {
      const keep = words.includes(wanted) && ["", site.verdict].includes(verdict.value) && ["", site.pass].includes(pass.value);
      row.hidden = !keep;
      if (detail) detail.hidden = !keep;
      shown += keep;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${records.length.toLocaleString("en")} products`;
  };
  const controls = document.getElementById("controls");
  controls.addEventListener("input", filter);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  filter();

  document.getElementById("save").addEventListener("click", () => {
    const { strings, shapes, ...report } = { ...packed, sites };
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(report, null, 1)], { type: "application/json" }));
    link.download = "loka-report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
