// The columns of the tables in the part of a site. A column is [header, value of an entry, class of its cells].

const number = (name, path, digits) => [name, (recipe) => show(measured(recipe, path), digits), "number"];
// What a recipe of a forward product does to the loss, relative to it.
const ofLoss = (name, key) => [name, (recipe) => show(recipe.loss?.[key] ?? null), "number"];
const recipeColumns = (rows) => [
  ["pass", (recipe) => recipe.pass],
  ["recipe", (recipe) => recipe.recipe],
  ["format", (recipe) => recipe.format],
  ["verdict", (recipe) => element("span", recipe.verdict, "mark " + recipe.verdict)],
  ["samples", (recipe) => recipe.n, "number"],
  ["decided by", (recipe) => recipe.gate],
  number("mean", "row_error.mean"),
  number("low", "row_error.low"),
  number("high", "row_error.high"),
  number("p99 of rows", "row_error.p99"),
  number("upper", "row_error.upper_tolerance"),
  number("relative_error", "relative_error"),
  number("SQNR [dB]", "sqnr_db"),
  ["SQNR at least [dB]", (recipe) => show(recipe.sqnr_low_db), "number"],
  number("MERE", "mere"),
  number("bias", "bias"),
  ...(rows.some((row) => row.recipes.some((recipe) => recipe.loss))
    ? [
        ofLoss("kl", "kl"),
        ofLoss("kl high", "kl_high"),
        ofLoss("cost", "cost"),
        ofLoss("first order", "first_order"),
        ofLoss("loss low", "low"),
        ofLoss("loss high", "high"),
        ofLoss("loss samples", "samples"),
        ofLoss("labels", "labels"),
      ]
    : []),
  ["horizon [steps]", (recipe) => recipe.horizon ?? "frozen weights", "number"],
  ["drift per 100 steps", (recipe) => (recipe.drift ? percent(recipe.drift.per_100_steps) : "-"), "number"],
  ["crosses the bound at step", (recipe) => (recipe.drift ? show(recipe.drift.crosses_at, 6) : "-"), "number"],
  ["note", (recipe) => recipe.note, "words"],
];
const passColumns = (rows) => [
  ["pass", (row) => row.pass],
  ["verdict", (row) => element("span", row.verdict, "mark " + row.verdict)],
  ["best recipe", (row) => row.best],
  ["mean", (row) => show(best(row) ? measured(best(row), "row_error.mean") : null), "number"],
  ["upper", (row) => show(best(row) ? measured(best(row), "row_error.upper_tolerance") : null), "number"],
  ["bound", (row) => (row.bound.metric === "loss" ? `${row.bound.text} of the loss` : row.bound.text)],
  ["m x k x n", (row) => (row.batch > 1 ? row.batch + "x" : "") + [row.m, row.k, row.n].join("x"), "number"],
  ["calls a step", (row) => show(row.calls), "number"],
  ["of FLOPs", (row) => percent(row.flop_share), "number"],
  ...(rows.some((row) => row.chosen)
    ? [
        ["kernel", (row) => row.chosen],
        ["speed", (row) => times(row.speed), "number"],
      ]
    : []),
];
const kernelColumns = (rows) => [
  ["pass", (kernel) => kernel.pass],
  ["kernel", (kernel) => kernel.kernel],
  ["status", (kernel) => kernel.status],
  ["time [us]", (kernel) => show(kernel.time_us), "number"],
  ["speed", (kernel) => times(kernel.speedup), "number"],
  ["upper", (kernel) => show(kernel.error_upper), "number"],
  ...(rows.some((row) => row.kernels.some((kernel) => kernel.loss_cost !== null))
    ? [["costs the loss", (kernel) => show(kernel.loss_cost), "number"]]
    : []),
  ["reason", (kernel) => kernel.reason, "words"],
];
const operandColumns = (recipes) => [
  ["pass", (operand) => operand.pass],
  ["operand", (operand) => operand.role],
  ["amax", (operand) => show(operand.amax), "number"],
  ["rms", (operand) => show(operand.rms), "number"],
  ["zeros", (operand) => percent(operand.zeros), "number"],
  ["NaN", (operand) => operand.nan, "number"],
  ["Inf", (operand) => operand.inf, "number"],
  ...recipes.flatMap((recipe) => [
    [recipe + " underflow", (operand) => percent(operand.underflow[recipe]), "number"],
    [recipe + " saturation", (operand) => percent(operand.saturation[recipe]), "number"],
  ]),
  ["note", (operand) => operand.note, "words"],
];
