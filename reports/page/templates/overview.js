// The page's own charts: error against bound, and time won against error spent; and the keyboard on the model map.

// More sites than this stand side by side instead of one below the other; more points than this are thinned.
const MOST_LINES = 40;
const MOST_POINTS = 2500;

// What a product is judged by: the interval, the tolerance that is compared with the bound, and the bound.
const judged = (site, at) => {
  const recipe = best(site);
  const entry = (low, mean, high, upper) => {
    const words =
      `${forPlotly(siteName(site.site))} ${site.pass}<br>${forPlotly(site.best)}: mean ${show(mean)}, upper ${show(upper)}` +
      `<br>bound ${show(most(site))}: ${site.verdict}`;
    return {
      at,
      verdict: site.verdict,
      low,
      mean,
      high,
      upper,
      most: most(site),
      words,
      key: site.site,
      gate: recipe.gate,
    };
  };
  if (!recipe) return null;
  if (site.bound.metric !== "loss")
    return entry(...["low", "mean", "high", "upper_tolerance"].map((key) => measured(recipe, "row_error." + key)));
  return recipe.loss && entry(recipe.loss.kl_low, recipe.loss.kl, recipe.loss.kl_high, recipe.loss.cost);
};

// Those that are not safe are all kept; of the safe ones as many, evenly, as there is room for.
const thinned = (entries) => {
  if (entries.length <= MOST_POINTS) return entries;
  const open = entries.filter(({ verdict }) => verdict !== "safe").slice(0, MOST_POINTS);
  const safe = entries.filter(({ verdict }) => verdict === "safe");
  const room = Math.min(MOST_POINTS - open.length, safe.length);
  const kept = Array.from({ length: room }, (_, at) => safe[Math.floor((at * safe.length) / room)]);
  const chosen = new Set([...open, ...kept]);
  return entries.filter((entry) => chosen.has(entry));
};

// What the caption adds for one pass: another measure, products without an error, a choice among too many.
const errorWords = (all, known, shown) => {
  const count = (list) => list.length.toLocaleString("en");
  const words = [];
  if (all.some((site) => site.bound.metric === "loss"))
    words.push(
      "Under a budget of loss: what the recipe adds to the loss, relative to it; the bar is an upper bound on it,",
      "each product alone against the whole budget.",
    );
  if (known.length < all.length)
    words.push(`Nothing to show for ${(all.length - known.length).toLocaleString("en")} of ${count(all)}.`);
  if (shown.length < known.length)
    words.push(`Shown: ${count(shown)} of ${count(known)}, every one that is not safe, and safe ones at even steps.`);
  return words.map((word) => " " + word).join("");
};

const errorTitle = (all, shown) => {
  if (all.some((site) => site.bound.metric === "loss")) return "increase of the loss, relative";
  return shown.some(({ gate }) => gate !== "row_error") ? "row_error, or relative_error" : "row_error";
};

const errorLayout = (all, shown, lines, narrow) => {
  const logged = logAxis(errorTitle(all, shown), numbersOf(shown));
  if (!lines) {
    const order = axis("sites in the order in which they ran", { range: [-1, all.length] });
    return { height: 420, showlegend: true, xaxis: order, yaxis: logged };
  }
  const names = axis("", {
    tickvals: shown.map(({ at }) => at),
    ticktext: shown.map(({ key }) => forPlotly(short(siteName(key), narrow ? 18 : 34))),
    range: [shown.length - 0.5, -0.5],
    tickfont: { family: "ui-monospace, Menlo, Consolas, monospace", size: 11 },
  });
  return { height: 110 + 22 * Math.max(shown.length, 2), showlegend: true, xaxis: logged, yaxis: names };
};

const errorChart = (report, openSite) => {
  const [node, caption] = [byId("errors-chart"), byId("errors-caption")];
  const words = caption.textContent;
  const passes = Object.keys(report.summary.passes).filter((pass) => report.sites.some((site) => site.pass === pass));
  const drawPass = (pass) => {
    const all = report.sites.filter((site) => site.pass === pass);
    const known = all.map(judged).filter((entry) => entry && positive(entry.mean));
    const lines = known.length <= MOST_LINES;
    const shown = lines ? known.map((entry, at) => ({ ...entry, at })) : thinned(known);
    const safe = all.filter(({ verdict }) => verdict === "safe").length;
    caption.textContent = words + errorWords(all, known, shown);
    node.setAttribute("role", "img");
    node.setAttribute(
      "aria-label",
      `Error against bound, ${pass}: ${safe} of ${all.length} products safe. The table has the numbers.`,
    );
    const narrow = node.clientWidth < 560;
    draw(node, intervalTraces(shown, lines), errorLayout(all, shown, lines, narrow), openSite);
  };
  radios(byId("errors-pass"), "errors-pass", passes, drawPass);
  drawLater(node, () => drawPass(passes[0]));
};

const timeChart = (pareto) => {
  const node = byId("time-chart");
  if (!node) return;
  const { points, plan, bound, metric } = pareto;
  const hover = points.map(
    ([error, speed, products]) =>
      `${speed.toFixed(3)}x within ${show(error)}<br>${products.toLocaleString("en")} products in FP8`,
  );
  const traces = [
    {
      type: "scatter",
      mode: points.length > 60 ? "lines" : "lines+markers",
      name: "within an error",
      hoverinfo: "text",
      hovertext: hover,
      x: points.map(([error]) => error),
      y: points.map(([, speed]) => speed),
      line: { shape: "hv", color: "#0072b2", width: 2 },
      marker: { size: 5, color: "#0072b2" },
    },
  ];
  if (plan)
    traces.push({
      type: "scatter",
      mode: "markers",
      name: "decided here",
      hoverinfo: "text",
      hovertext: [`${plan[1].toFixed(3)}x at ${show(plan[0])}`],
      x: [plan[0]],
      y: [plan[1]],
      marker: { symbol: "star", size: 13, color: "#d55e00" },
    });
  const speeds = [1, ...points.map(([, speed]) => speed), ...(plan ? [plan[1]] : [])];
  const room = 0.08 * (Math.max(...speeds) - Math.min(...speeds)) || 0.05;
  traces.push({
    type: "scatter",
    mode: "lines",
    name: "bound",
    hoverinfo: "skip",
    x: [bound, bound],
    y: [Math.min(...speeds) - room, Math.max(...speeds) + room],
    line: { color: GREY, width: 2 },
  });
  const errors = [bound, ...points.map(([error]) => error), ...(plan ? [plan[0]] : [])];
  const title =
    metric === "loss"
      ? "upper bound on what is added to the loss, relative to it"
      : `largest upper tolerance of ${metric}`;
  node.setAttribute("role", "img");
  const [last] = points.slice(-1);
  node.setAttribute(
    "aria-label",
    `Time won against error spent: up to ${last[1].toFixed(2)} times the speed of the baselines, within an error of ${show(last[0])}.`,
  );
  drawLater(node, () =>
    draw(node, traces, {
      height: 360,
      showlegend: true,
      xaxis: logAxis(title, errors),
      yaxis: axis("speed of one step\u2019s GEMMs", {
        ticksuffix: "x",
        range: [Math.min(...speeds) - room, Math.max(...speeds) + room],
      }),
    }),
  );
};

// One stop of the tab key for the whole map; arrows lead along it.
const startMap = (openSite) => {
  const links = [...document.querySelectorAll("#map a")];
  links.forEach((link, index) => link.setAttribute("tabindex", index ? "-1" : "0"));
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  byId("map").addEventListener("keydown", (event) => {
    const at = links.indexOf(event.target.closest("a"));
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const to = links[Math.min(links.length - 1, Math.max(0, at + steps[event.key]))];
    links[at].setAttribute("tabindex", "-1");
    to.setAttribute("tabindex", "0");
    to.focus();
  });
};
