// The charts in the part of a site: errors by recipe, error over training, operands against the grid of FP8.

const folded = (summary, ...nodes) => {
  const details = element("details");
  details.append(element("summary", summary), ...nodes);
  return details;
};
const captioned = (text) => element("p", text, "caption");
const chartBox = (label) => {
  const node = element("div", undefined, "graph");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
  return node;
};
const styleOf = (names) => Object.fromEntries(names.map((name, at) => [name, SERIES[at % SERIES.length]]));

// --- errors by recipe and pass ---

const recipeChart = (box, rows) => {
  const entries = rows.flatMap((row) =>
    row.recipes.map((recipe) => {
      const [low, mean, high, upper] = ["low", "mean", "high", "upper_tolerance"].map((key) =>
        measured(recipe, "row_error." + key),
      );
      const words = [
        `${row.pass} ${forPlotly(recipe.recipe)}: ${recipe.verdict}`,
        `mean ${show(mean)}, ${show(low)} to ${show(high)}`,
        `upper ${show(upper)}, ${recipe.n} samples`,
      ];
      const limit = row.bound.metric === "loss" ? null : most(row);
      return {
        verdict: recipe.verdict,
        low,
        mean,
        high,
        upper,
        most: limit,
        words: words.join("<br>"),
        name: `${row.pass} ${recipe.recipe}`,
      };
    }),
  );
  const shown = entries.filter(({ mean }) => positive(mean)).map((entry, at) => ({ ...entry, at }));
  if (!shown.length) return box.append(captioned("No recipe has an error here yet: too few steps were measured."));
  const key = "Line: interval of the mean over steps; mark: the mean; bar: upper tolerance of 99 % of steps;";
  box.append(captioned(`${key} grey: the bound that it is compared with.`));
  const node = box.appendChild(
    chartBox("Errors of every recipe in every pass, against the bound. The table below has the numbers."),
  );
  const ticks = { tickvals: shown.map(({ at }) => at), ticktext: shown.map(({ name }) => forPlotly(name)) };
  const yaxis = axis("", { ...ticks, range: [shown.length - 0.5, -0.5] });
  const layout = {
    height: 100 + 22 * shown.length,
    showlegend: true,
    xaxis: logAxis("error", numbersOf(shown)),
    yaxis,
  };
  drawLater(node, () => draw(node, intervalTraces(shown, true), layout));
};

// --- error over training ---

// Recipes whose error drifts by more than noise.
const driftingOf = (row) => row.recipes.filter((recipe) => recipe.drift?.significant && recipe.drift.error);

const historyWords = (row, history) => {
  const drifting = driftingOf(row);
  const horizons = row.recipes.map((recipe) => recipe.horizon).filter((horizon) => horizon !== null);
  const count = (steps) => steps.toLocaleString("en");
  const drifts = drifting.map(({ recipe, drift }) => {
    const crosses = drift.crosses_at === null ? "" : `, and crosses the bound about step ${count(drift.crosses_at)}`;
    return `${recipe} drifts by ${percent(drift.per_100_steps)} per 100 steps (${percent(drift.low)} to ${percent(drift.high)})${crosses}.`;
  });
  return [
    history.steps.length < history.of
      ? `${history.steps.length} of ${history.of} sampled steps are drawn, evenly chosen.`
      : `All ${history.of} sampled steps.`,
    horizons.length
      ? `Weights were training: the evidence holds for ${count(Math.min(...horizons))} steps beyond the last sample.`
      : "Weights were frozen: nothing drifts.",
    ...drifts,
    ...(horizons.length && !drifting.length ? ["No drift that is more than noise."] : []),
    ...(drifting.some(({ drift }) => drift.crosses_at !== null) ? ["Probe again before the first crossing."] : []),
  ].join(" ");
};

// The fitted line of a recipe that drifts, a little beyond its newest sample, and where it crosses the bound.
const trendTraces = ({ recipe, drift }, limit, color) => {
  const { step, span, error, per_100_steps: rate, crosses_at: crosses } = drift;
  const end = Math.min(crosses ?? step + span / 2, step + 2 * span);
  const x = [step - span, step, end];
  const line = {
    type: "scatter",
    mode: "lines",
    name: "trend",
    hoverinfo: "text",
    hovertext: `${forPlotly(recipe)}: ${percent(rate)} per 100 steps`,
    x,
    y: x.map((at) => error * Math.exp(((at - step) * Math.log1p(rate)) / 100)),
    line: { color, width: 3 },
    opacity: 0.45,
  };
  if (crosses === null || crosses > end || limit === null) return [line];
  const hovertext = `${forPlotly(recipe)} crosses the bound about step ${crosses}`;
  return [
    line,
    {
      type: "scatter",
      mode: "markers",
      name: "crosses the bound",
      hoverinfo: "text",
      hovertext,
      x: [crosses],
      y: [limit],
      marker: { symbol: "star", size: 12, color: VERDICTS.unsafe.color },
    },
  ];
};

const historyTraces = (row, history) => {
  const styles = styleOf(Object.keys(history.recipes));
  const limit = row.bound.metric === "loss" ? null : most(row);
  const traces = Object.entries(history.recipes).map(([name, errors]) => ({
    type: "scatter",
    mode: "lines+markers",
    name: forPlotly(name),
    connectgaps: true,
    x: history.steps,
    y: errors.map(positive),
    line: { color: styles[name].color, width: 1.5, dash: styles[name].dash },
    marker: { symbol: styles[name].symbol, size: 5, color: styles[name].color },
    hovertemplate: "step %{x}: %{y:.3g}<extra></extra>",
  }));
  const marks = driftingOf(row).flatMap((recipe) => trendTraces(recipe, limit, styles[recipe.recipe]?.color ?? GREY));
  // One entry of the legend for all trends, and one for all crossings.
  for (const mark of marks) mark.showlegend = mark === marks.find(({ name }) => name === mark.name);
  traces.push(...marks);
  const ends = traces.flatMap(({ x }) => [x[0], x[x.length - 1]]);
  const range = [Math.min(...ends), Math.max(...ends)];
  if (limit !== null)
    traces.push({
      type: "scatter",
      mode: "lines",
      name: "bound",
      hoverinfo: "skip",
      x: range,
      y: [limit, limit],
      line: { color: GREY, width: 2 },
    });
  return { traces, range };
};

const historyChart = (box, rows, material) => {
  const known = rows.filter((row) => material.histories[row.site]?.[row.pass]);
  if (!known.length)
    return box.append(captioned("This page was made without the database, which holds the errors of single steps."));
  const fieldset = box.appendChild(element("fieldset"));
  fieldset.append(element("legend", "Pass"));
  const caption = box.appendChild(captioned(""));
  const node = box.appendChild(chartBox("Error over training, by recipe."));
  const drawPass = (pass) => {
    const row = known.find((one) => one.pass === pass);
    const history = material.histories[row.site][pass];
    caption.textContent = visible(historyWords(row, history));
    const {
      traces,
      range: [first, last],
    } = historyTraces(row, history);
    const room = 0.02 * (last - first + 1);
    const yaxis = logAxis(
      best(row)?.gate ?? "error",
      traces.flatMap((trace) => trace.y),
    );
    draw(node, traces, {
      height: 320,
      showlegend: true,
      xaxis: axis("step", { range: [first - room, last + room] }),
      yaxis,
    });
  };
  radios(
    fieldset,
    "history-pass",
    known.map((row) => row.pass),
    drawPass,
  );
  drawLater(node, () => drawPass(known[0].pass));
};

// --- operands against the grid of FP8 ---

// The positive values of a format in octaves below its largest.
const gridOf = (format) => {
  const values = [];
  const step = 2 ** -format.mantissa_bits;
  for (let exponent = format.min_exponent; 2 ** exponent <= format.max; exponent += 1)
    for (let mantissa = 1; mantissa < 2; mantissa += step)
      if (mantissa * 2 ** exponent <= format.max) values.push(mantissa * 2 ** exponent);
  for (let part = 1; part * step < 1; part += 1) values.push(part * step * 2 ** format.min_exponent);
  return values.map((value) => Math.log2(value / format.max)).filter((octave) => octave >= -25);
};

const operandChart = (box, role, histogram, material) => {
  const part = box.appendChild(element("div"));
  part.append(element("h4", `${role}, ${histogram.samples} sampled steps`));
  const node = part.appendChild(chartBox(`Energy of ${role} by magnitude, against the grid of e4m3.`));
  const format = material.formats.e4m3;
  const per = material.bins_of_an_octave;
  const floor = -100;
  const octave = (bin) => (bin === 0 ? 0 : -(bin - 0.5) / per);
  const styles = styleOf(Object.keys(histogram.groups));
  const groups = Object.entries(histogram.groups).map(([name, text]) => [name, levelsOf(text)]);
  const traces = groups.map(([name, levels]) => ({
    type: "scatter",
    mode: "lines",
    name: forPlotly(name),
    x: levels.map((_, bin) => octave(bin)),
    y: levels.map((level) => (level === null || level < floor ? null : level)),
    line: { shape: "hvh", color: styles[name].color, width: 1.75, dash: styles[name].dash },
    hovertemplate: "%{x:.2f} octaves: %{y} dB of the energy<extra></extra>",
  }));
  const ticks = gridOf(format).flatMap((x) => [
    [x, floor],
    [x, floor + 7],
    [null, null],
  ]);
  traces.push({
    type: "scatter",
    mode: "lines",
    name: "e4m3",
    hoverinfo: "skip",
    x: ticks.map(([x]) => x),
    y: ticks.map(([, y]) => y),
    line: { color: GREY, width: 1 },
  });
  const normal = Math.log2(2 ** format.min_exponent / format.max);
  const zero = normal - format.mantissa_bits - 1;
  const band = (x0, x1, opacity) => ({
    type: "rect",
    xref: "x",
    yref: "paper",
    x0,
    x1,
    y0: 0,
    y1: 1,
    fillcolor: GREY,
    opacity,
    line: { width: 0 },
    layer: "below",
  });
  const label = (x, text) => ({
    x,
    y: 0.1,
    xref: "x",
    yref: "paper",
    text,
    textangle: -90,
    showarrow: false,
    xanchor: "center",
    yanchor: "bottom",
    font: { size: 11 },
  });
  drawLater(node, () =>
    draw(node, traces, {
      height: 270,
      showlegend: true,
      legend: { orientation: "h", x: 0, y: -0.12, xanchor: "left", yanchor: "top" },
      margin: { t: 8, b: 84 },
      shapes: [band(zero, normal, 0.12), band(-25, zero, 0.28)],
      annotations: [label((normal + zero) / 2, "subnormal"), label((zero - 25) / 2, "zero")],
      xaxis: axis("", { range: [-25, 0.6], dtick: 8, tickangle: 0 }),
      yaxis: axis("energy [dB]", { range: [floor, 3], dtick: 20 }),
    }),
  );
};

const operandPart = (box, rows, material) => {
  const seen = material.histograms[rows[0].site];
  if (seen && Object.keys(seen).length) {
    const words = [
      "Energy by magnitude: across, octaves below the largest element of a scaling group (tensor, row, or block),",
      "which a scale maps to the largest FP8 value. Grey ticks: the values that e4m3 has. Energy in the lighter band",
      "loses bits, in the darker one it becomes zero. e5m2 reaches below all of it, with half as many values to an octave.",
    ];
    box.append(captioned(words.join(" ")));
    const parts = box.appendChild(element("div", undefined, "operands"));
    for (const [role, histogram] of Object.entries(seen)) operandChart(parts, role, histogram, material);
  } else
    box.append(
      captioned(
        material.partial
          ? "The page of a model this large has histograms of the sites that need attention first; this is none of them."
          : "No histograms: nothing was learned of these operands, or the page was made without the database.",
      ),
    );
  const operands = rows.flatMap((row) =>
    Object.entries(row.operands).map(([role, operand]) => ({ pass: row.pass, role, ...operand })),
  );
  const named = [...new Set(operands.flatMap((operand) => Object.keys(operand.underflow)))];
  if (operands.length) box.append(folded("Numbers of the operands", grid(operandColumns(named), operands, "Operands")));
};
