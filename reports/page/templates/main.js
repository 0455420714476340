// What happens when: the table first, then charts as they are seen; a site opens with the fragment that names it.

const startSites = (report, rows, detailsOf) => {
  const dialog = byId("site");
  const bySite = new Map();
  report.sites.forEach((row, at) => bySite.set(row.site, [...(bySite.get(row.site) ?? []), at]));
  const names = [...bySite.keys()];
  const fragments = new Map(); // site -> fragment, as the table writes it
  for (const row of rows)
    fragments.set(report.sites[Number(row.dataset.i)].site, row.querySelector("a").getAttribute("href"));
  const sites = new Map([...fragments].map(([site, fragment]) => [fragment, site]));
  let material;
  let returnTo = null;

  const open = async (site) => {
    material ??= readMaterial();
    const at = names.indexOf(site);
    const to = (next) => (names[next] === undefined ? null : () => openSite(names[next]));
    const [found, details] = [await material, await detailsOf()];
    const passes = bySite.get(site).map((row) => ({ ...report.sites[row], ...details[row] }));
    if (sites.get(location.hash) !== site) return;
    if (!dialog.open) dialog.showModal();
    fillSite(dialog, passes, found, { previous: to(at - 1), next: to(at + 1), close: () => dialog.close() });
  };
  const follow = () => {
    const site = sites.get(location.hash);
    if (site !== undefined) open(site);
    else if (dialog.open) dialog.close();
  };
  const openSite = (site) => {
    if (!dialog.open) returnTo = document.activeElement;
    const fragment = fragments.get(site);
    if (location.hash !== fragment) history.pushState(null, "", fragment);
    follow();
  };
  dialog.addEventListener("close", () => {
    forget(dialog.querySelectorAll(".graph"));
    dialog.replaceChildren();
    if (sites.has(location.hash)) history.pushState(null, "", location.pathname + location.search);
    // This comes a while after the dialog is gone, when whoever uses the keyboard may have gone on.
    if (document.activeElement === document.body) returnTo?.focus?.();
  });
  dialog.addEventListener(
    "click",
    (event) => event.target === dialog && event.clientX < dialog.getBoundingClientRect().left && dialog.close(),
  );
  window.addEventListener("popstate", follow);
  window.addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const fragment = event.target.closest?.("a[href^='#site/']")?.getAttribute("href");
    if (!sites.has(fragment) || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    openSite(sites.get(fragment));
  });
  follow();
  return openSite;
};

const start = async () => {
  if (!byId("table")) return;
  const report = await inflateJson("report");
  const rows = [...document.querySelectorAll("#table tbody tr")];
  startTable(report, rows);
  let details;
  const detailsOf = () => (details ??= readDetails(report.sites));
  startSaving(report, detailsOf);
  const openSite = startSites(report, rows, detailsOf);
  startMap(openSite);
  startPrinting();
  errorChart(report, openSite);
  if (report.pareto) timeChart(report.pareto);
};

start().then(
  () => performance.mark("interactive"),
  (error) => {
    const note = element(
      "p",
      `Search, charts and the parts of sites are off: this browser could not start them (${error.message}). The table is complete.`,
      "caption",
    );
    document.querySelector("main").prepend(note);
  },
);
