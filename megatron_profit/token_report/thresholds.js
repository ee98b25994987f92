const TAUS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9];
const EXAMPLES = 8;

// The probabilities that threshold, colours and histogram read: the model's p, or the reference's q.
const signal = record => $("signal").value === "reference" ? record.q : record.p;
const supervisedOf = record => signal(record).filter((_, i) => record.supervised[i]);

// The bound of a quantile of probabilities in rising order, as in objectives/quantiles.py: at least one is kept.
function boundOf(quantile, sorted, isUpper) {
  // 0.3 of 10 tokens is 3, not the 3.0000000000000004 of a product.
  const share = Math.round(quantile * sorted.length * 1e9) / 1e9;
  return isUpper ? sorted[Math.max(Math.ceil(share), 1) - 1]
    : sorted[Math.min(Math.floor(share), sorted.length - 1)];
}

// record -> [lower, upper] bound on the signal, from the controls.
function bounds() {
  const first = +$("tau").value, second = +$("upper").value, scope = $("scope").value;
  if (scope === "constant") return () => [first, second];
  const known = new Map(), direction = $("direction").value;
  return record => {
    const group = scope === "record" ? record : data;
    if (!known.has(group)) {
      const records = scope === "record" ? [record] : data.records;
      const sorted = Float64Array.from(records.flatMap(supervisedOf)).sort();
      known.set(group, [boundOf(first, sorted, direction === "lower"), boundOf(second, sorted, true)]);
    }
    return known.get(group);
  };
}

// Whether a token is kept under each direction.
const KEEPS = {
  higher: (p, low) => !(p < low), lower: (p, low) => !(p > low),
  middle: (p, low, high) => !(p < low || p > high),
};

// The bound in words, where it follows from a quantile of all tokens.
function boundText() {
  if ($("scope").value !== "global_batch") return "";
  const [low, high] = bounds()(data.records[0]);
  const ends = $("direction").value === "middle" ? [low, high] : [low];
  return `, threshold ${ends.map(p => p.toPrecision(3)).join(" and ")}`;
}

// For each tau, the share at or above it, and the tokens that it drops and the tau before keeps.
function fillChoosing() {
  const tokens = data.records.flatMap(record => signal(record)
    .map((p, i) => [p, record.pieces[i]]).filter((_, i) => record.supervised[i]));
  $("choosing").tBodies[0].replaceChildren(...TAUS.map((tau, t) => {
    const counts = new Map();
    for (const [p, piece] of tokens) {
      if (p < tau && !(p < (TAUS[t - 1] ?? 0))) counts.set(piece, (counts.get(piece) ?? 0) + 1);
    }
    const often = [...counts].sort((a, b) => b[1] - a[1]).slice(0, EXAMPLES);
    const kept = tokens.filter(([p]) => !(p < tau)).length;
    return element("tr", {}, element("td", {}, String(tau)), element("td", {}, percent(kept / tokens.length)),
      element("td", {}, often.map(([piece, n]) => quoted(piece) + (n > 1 ? ` (${n})` : "")).join(", ")));
  }));
}
