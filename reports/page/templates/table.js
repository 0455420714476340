// The table: search, sort, and no more rows in the page than can be read.

const SHOWN_ROWS = 200;

const sortKeys = (report) => {
  const { sites, bound } = report;
  const error = (key) => (site) => (best(site) ? measured(best(site), "row_error." + key) : null);
  const hasLoss = sites.some((site) => site.recipes.some((recipe) => recipe.loss));
  const lossCells = hasLoss ? ["kl", ...(bound.loss === null ? [] : ["cost"])] : [];
  const decided = sites.some((site) => site.decided);
  return [
    (site) => site.site,
    (site) => site.pass,
    (site) => site.flops,
    (site) => site.flop_share,
    (site) => site.best,
    error("mean"),
    error("upper_tolerance"),
    ...lossCells.map((name) => (site) => best(site)?.loss?.[name] ?? null),
    (site) => ["unsafe", "undecided", "safe"].indexOf(site.verdict),
    ...(bound.per_site?.length ? [(site) => site.bound.text] : []),
    ...(decided ? [(site) => site.chosen, (site) => site.speed] : []),
  ];
};

// Unknown values come last in both directions; equal ones keep their order.
const collator = new Intl.Collator("en", { numeric: true });
const compare = (a, b, sign) => {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "string") return sign * collator.compare(a, b);
  return a === b ? 0 : sign * (a < b ? -1 : 1);
};

const startTable = (report, rows) => {
  const table = byId("table");
  const body = table.tBodies[0];
  const keys = sortKeys(report);
  const records = rows.map((row) => {
    const site = report.sites[Number(row.dataset.i)];
    return { row, site, words: [site.site, site.best, site.chosen, site.op].join(" ").toLowerCase() };
  });
  const [text, verdict, pass, count, more] = ["text", "verdict", "pass", "count", "more"].map(byId);
  let limit = SHOWN_ROWS;

  const fill = () => {
    const wanted = text.value.trim().toLowerCase();
    const found = records.filter(
      ({ site, words }) =>
        words.includes(wanted) && ["", site.verdict].includes(verdict.value) && ["", site.pass].includes(pass.value),
    );
    const rest = found.length - limit;
    body.replaceChildren(...found.slice(0, limit).map(({ row }) => row));
    more.parentElement.hidden = rest <= 0;
    more.textContent = `Show ${Math.min(rest, 5 * SHOWN_ROWS).toLocaleString("en")} more`;
    const shown = rest > 0 ? `, the first ${limit.toLocaleString("en")} shown` : "";
    count.textContent = `${found.length.toLocaleString("en")} of ${records.length.toLocaleString("en")} products${shown}`;
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
      const value = new Map(records.map((record) => [record, keys[index](record.site)]));
      records.sort((a, b) => compare(value.get(a), value.get(b), ascending ? 1 : -1));
      fill();
    });
  });

  const controls = byId("controls");
  controls.addEventListener("input", () => {
    limit = SHOWN_ROWS;
    fill();
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit += 5 * SHOWN_ROWS;
    fill();
  });
  for (const rest of [...table.tBodies].slice(1)) rest.remove();
  controls.hidden = false;
  count.setAttribute("aria-live", "polite");
  fill();
};

// The report as the JSON format has it: without what the page adds.
const startSaving = (report, detailsOf) => {
  byId("save").addEventListener("click", async () => {
    const details = await detailsOf();
    const { pareto, ...rest } = report;
    const sites = report.sites.map(({ decided, speed, ...site }, at) => ({ ...site, ...details[at] }));
    const link = element("a");
    link.href = URL.createObjectURL(
      new Blob([JSON.stringify({ ...rest, sites }, null, 1)], { type: "application/json" }),
    );
    link.download = "loka-report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
};
