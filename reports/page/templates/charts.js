// Charts: Plotly is started when the first of them comes into view. Colours of text and grid are the page's (page.css);
// those of marks stand out on light and dark alike.

const VERDICTS = {
  safe: { color: "#009e73", symbol: "circle" },
  undecided: { color: "#cc79a7", symbol: "diamond-open" },
  unsafe: { color: "#d55e00", symbol: "x" },
};
const SERIES = [
  { color: "#0072b2", symbol: "circle", dash: "solid" },
  { color: "#d55e00", symbol: "square", dash: "dash" },
  { color: "#009e73", symbol: "diamond", dash: "dot" },
  { color: "#cc79a7", symbol: "triangle-up", dash: "dashdot" },
  { color: "#8c7a00", symbol: "cross", dash: "longdash" },
  { color: "#767d84", symbol: "star", dash: "longdashdot" },
];
const GREY = "#868e96";
const PAPER_WIDTH = 680;
const drawn = new Set();

let plotlyStarted;
const startPlotly = () => {
  plotlyStarted ??= inflate("plotly").then((text) => {
    // It brings style sheets of maps, which no chart here is, unless an element with their name is there.
    for (const [, name] of text.matchAll(/getElementById\("([0-9a-f]{64})"\)/g))
      document.head.append(Object.assign(element("template"), { id: name }));
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
    if (!window.Plotly) throw new Error("Plotly did not start");
    return window.Plotly;
  });
  return plotlyStarted;
};

const layoutOf = (layout) => ({
  autosize: true,
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: 'system-ui, "Segoe UI", Roboto, Arial, sans-serif', size: 12 },
  hovermode: "closest",
  dragmode: false,
  showlegend: false,
  legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom" },
  ...layout,
  margin: { l: 56, r: 12, t: 28, b: 44, ...layout.margin },
});

const axis = (title, more = {}) => ({
  title: { text: title, font: { size: 12 }, standoff: 8 },
  zeroline: false,
  automargin: true,
  fixedrange: true,
  ticks: "",
  ...more,
});

// Round values, evenly spaced.
const evenTicks = (low, high) => {
  const raw = (high - low) / 4;
  const decade = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((tick) => tick * decade).find((tick) => tick >= raw);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, at) =>
    Number(((first + at) * step).toPrecision(6)),
  );
};

// Ticks at 1, 2 and 5 of every decade, over a wide range at 1 alone, over a narrow one evenly; a range that is never empty.
const logAxis = (title, values, more = {}) => {
  const known = values.filter((value) => Number.isFinite(value) && value > 0);
  const low = known.length ? Math.min(...known) / 1.25 : 0.001;
  const high = known.length ? Math.max(...known) * 1.25 : 1;
  const wide = high / low > 500;
  const every = Math.max(1, Math.ceil(Math.log10(high / low) / 8));
  let tickvals = [];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade += 1)
    for (const step of wide ? [1] : [1, 2, 5]) {
      const value = Number(`${step}e${decade}`);
      if (value >= low && value <= high && (!wide || decade % every === 0)) tickvals.push(value);
    }
  if (tickvals.length < 3) tickvals = evenTicks(low, high);
  const ticktext = tickvals.map((value) => show(value, 6));
  return axis(title, { type: "log", range: [Math.log10(low), Math.log10(high)], tickvals, ticktext, ...more });
};

const draw = async (node, traces, layout, onPoint) => {
  const Plotly = await startPlotly();
  node.hidden = false;
  const made = layoutOf(layout);
  node.style.minHeight = `${made.height}px`;
  await Plotly.react(node, traces, made, {
    displayModeBar: false,
    responsive: true,
    showTips: false,
    doubleClick: false,
  });
  drawn.add(node);
  node.removeAllListeners?.("plotly_click");
  if (onPoint)
    node.on("plotly_click", ({ points }) => points[0]?.customdata !== undefined && onPoint(points[0].customdata));
};

const forget = (nodes) => {
  for (const node of nodes) {
    drawn.delete(node);
    window.Plotly?.purge(node);
  }
};

// Draw when it comes into view, or when the page has nothing else to do: what is printed must have been drawn.
const drawLater = (node, start) => {
  let begun = false;
  const begin = () => {
    if (begun) return;
    begun = true;
    observer.disconnect();
    start();
  };
  node.hidden = false;
  const observer = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && begin(), {
    rootMargin: "200px",
  });
  observer.observe(node);
  const idle = window.requestIdleCallback ?? ((callback) => setTimeout(callback, 500));
  idle(begin, { timeout: 5000 });
};

const startPrinting = () => {
  const resize = (change) => {
    for (const node of drawn) if (node.isConnected) window.Plotly.relayout(node, change(node));
  };
  window.addEventListener("beforeprint", () =>
    resize((node) => ({ width: Math.min(PAPER_WIDTH, node.clientWidth || PAPER_WIDTH), autosize: false })),
  );
  window.addEventListener("afterprint", () => resize(() => ({ width: null, autosize: true })));
};
