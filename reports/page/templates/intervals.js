// Errors with their intervals, as marks: what the chart of all sites and that of one site's recipes have in common.
//
// An entry is { at, verdict, low, mean, high, upper, most, words, key }: its place, its numbers (null where there is
// none), the bound, what is said of it, and what a click on it leads to. `lines`: one below the other, errors across;
// else side by side, errors up.

const positive = (value) => (Number.isFinite(value) && value > 0 ? value : null);

const numbersOf = (entries) =>
  entries.flatMap(({ low, mean, high, upper, most }) => [low, mean, high, upper, most].filter(positive));

const placed = (points, lines) => {
  const [errors, places] = [points.map(([error]) => error), points.map(([, at]) => at)];
  return lines ? { x: errors, y: places } : { x: places, y: errors };
};

// A line from one number to another of each entry; what is not positive lies at the floor of the chart.
const spans = (entries, from, to, lines) => {
  const floor = Math.min(...numbersOf(entries));
  const ends = entries.flatMap((entry) => {
    if (positive(entry[to]) === null) return [];
    const begin = entry[from] === null ? entry.mean : (positive(entry[from]) ?? floor);
    return [
      [begin, entry.at],
      [entry[to], entry.at],
      [null, null],
    ];
  });
  return placed(ends, lines);
};

const verdictTraces = (entries, verdict, lines) => {
  const { color, symbol } = VERDICTS[verdict];
  const quiet = { type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false };
  const uppers = entries.filter(({ upper }) => positive(upper)).map(({ upper, at }) => [upper, at]);
  const bar = {
    symbol: lines ? "line-ns-open" : "line-ew-open",
    size: lines ? 11 : 5,
    color,
    line: { width: 2, color },
  };
  const means = placed(
    entries.map(({ mean, at }) => [mean, at]),
    lines,
  );
  return [
    { ...quiet, ...spans(entries, "mean", "upper", lines), line: { color, width: 1 } },
    { ...quiet, ...spans(entries, "low", "high", lines), line: { color, width: lines ? 5 : 3 }, opacity: 0.55 },
    { ...quiet, mode: "markers", ...placed(uppers, lines), marker: bar },
    {
      type: "scatter",
      mode: "markers",
      name: verdict,
      hoverinfo: "text",
      hovertext: entries.map(({ words }) => words),
      ...means,
      customdata: entries.map(({ key }) => key),
      marker: { symbol, size: lines ? 9 : 6, color },
    },
  ];
};

const boundTrace = (entries, lines) => {
  const ends = entries.flatMap(({ most, at }) =>
    positive(most)
      ? [
          [most, at - 0.5],
          [most, at + 0.5],
          [null, null],
        ]
      : [],
  );
  return {
    type: "scatter",
    mode: "lines",
    name: "bound",
    hoverinfo: "skip",
    ...placed(ends, lines),
    line: { color: GREY, width: 2 },
  };
};

const intervalTraces = (entries, lines) => [
  ...Object.keys(VERDICTS).flatMap((verdict) => {
    const mine = entries.filter((entry) => entry.verdict === verdict);
    return mine.length ? verdictTraces(mine, verdict, lines) : [];
  }),
  boundTrace(entries, lines),
];
