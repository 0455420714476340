// The part of one site: its passes, errors by recipe and over training, operands, kernels, advice.

const expertPart = (box, rows) => {
  const row = rows.find((one) => one.experts);
  const { tokens, recipes, idle, steps } = row.experts;
  box.append(
    captioned(
      `${tokens.length} experts over ${steps} measured steps; without any token: ${idle.length ? idle.slice(0, 20).join(", ") : "none"}.`,
    ),
  );
  const node = box.appendChild(chartBox("Tokens of a step by expert."));
  const traces = [
    {
      type: "bar",
      x: tokens.map((_, at) => at),
      y: tokens,
      marker: { color: "#0072b2" },
      hovertemplate: "expert %{x}: %{y:.3g} tokens a step<extra></extra>",
    },
  ];
  drawLater(node, () => draw(node, traces, { height: 240, xaxis: axis("expert"), yaxis: axis("tokens a step") }));
  const error = (which, key) => (recipe) => (recipe[which] ? show(recipe[which].row_error[key]) : "-");
  box.append(
    grid(
      [
        ["recipe", (recipe) => recipe.recipe],
        ["safe", (recipe) => recipe.safe, "number"],
        ["unsafe", (recipe) => recipe.unsafe.join(", ") || "none", "words"],
        ["undecided", (recipe) => recipe.undecided, "number"],
        ["worst expert", (recipe) => recipe.worst?.expert ?? "-", "number"],
        ["its mean", error("worst", "mean"), "number"],
        ["rarely measured, mean", error("pooled", "mean"), "number"],
      ],
      recipes,
      "Experts by recipe",
    ),
  );
};

const siteParts = (rows, material) => [
  [
    "Errors by recipe and pass",
    true,
    (box) => {
      recipeChart(box, rows);
      const entries = rows.flatMap((row) => row.recipes.map((recipe) => ({ pass: row.pass, ...recipe })));
      if (entries.length) box.append(folded("All numbers", grid(recipeColumns(rows), entries, "Recipes")));
    },
  ],
  ["Error over training", true, (box) => historyChart(box, rows, material)],
  ["Operands against the grid of FP8", true, (box) => operandPart(box, rows, material)],
  ["Experts", rows.some((row) => row.experts), (box) => expertPart(box, rows)],
  [
    "Kernels",
    rows.some((row) => row.kernels.length),
    (box) => {
      const kernels = rows.flatMap((row) => row.kernels.map((kernel) => ({ pass: row.pass, ...kernel })));
      const [out, possible] = [true, false].map((rejected) =>
        kernels.filter(({ status }) => (status === "rejected") === rejected),
      );
      const list = (some, label) => grid(kernelColumns(rows), some, label, (kernel) => kernel.status);
      box.append(list(possible, "Kernels, chosen and admissible"));
      if (out.length)
        box.append(folded(`${out.length} rejected, each with its reason`, list(out, "Kernels, rejected")));
    },
  ],
  [
    "Advice",
    true,
    (box) => {
      const mine = material.advice.filter((each) => each.sites.includes(rows[0].site));
      if (!mine.length)
        return box.append(
          captioned(
            material.unadvised
              ? "Left out for a model this large: loka advise DB says it."
              : "Nothing is called for here.",
          ),
        );
      for (const each of mine) {
        box.append(element("p", `${each.mod} on ${each.where.join(", ")}`));
        const list = box.appendChild(element("ul", undefined, "notes"));
        for (const line of each.lines) list.append(element("li", line));
      }
    },
  ],
];

const button = (text, label, onClick, disabled = false) => {
  const node = element("button", text);
  Object.assign(node, { type: "button", disabled });
  node.setAttribute("aria-label", label);
  node.addEventListener("click", onClick);
  return node;
};

const fillSite = (dialog, rows, material, go) => {
  forget(dialog.querySelectorAll(".graph"));
  const top = element("div", undefined, "top");
  const name = top.appendChild(element("h2", siteName(rows[0].site)));
  name.id = "site-name";
  name.tabIndex = -1;
  const steps = top.appendChild(element("div", undefined, "steps"));
  steps.append(
    button("\u2190", "Previous site", go.previous, !go.previous),
    button("\u2192", "Next site", go.next, !go.next),
    button("Close", "Close", go.close),
  );
  const [row] = rows;
  const facts = [
    row.op,
    row.dtype,
    row.m_min === row.m_max ? "" : `m from ${row.m_min} to ${row.m_max}`,
    row.parameter ? `parameter ${row.parameter}` : "",
    row.part ? `${row.part} of a layer of experts` : "",
  ];
  dialog.replaceChildren(
    top,
    element("p", facts.filter(Boolean).join(", "), "facts"),
    grid(passColumns(rows), rows, "Passes"),
  );
  const open = rows.filter((row) => row.reason);
  if (open.length) {
    const list = dialog.appendChild(element("ul", undefined, "notes why"));
    for (const row of open) list.append(element("li", `${row.pass} is ${row.verdict}: ${row.reason}`));
  }
  for (const [title, wanted, fill] of siteParts(rows, material)) {
    if (!wanted) continue;
    dialog.append(element("h3", title));
    const box = dialog.appendChild(element("div"));
    fill(box);
  }
  dialog.scrollTop = 0;
  name.focus({ preventScroll: true });
};
