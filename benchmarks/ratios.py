"""Summarize the figures of two sides as a table of medians, ratios and spreads."""

from statistics import median

from brisk.errors import format_bytes

HEAD = f"{'':<46}{'brisk':>10}{'nanogpt':>10}   {'ratio (lowest to highest)':<27}spreads"


def row(section, what, runs, key, unit="s", tokens=0):
    """A row of the result, with `key` of the figures of each round. `tokens`: tokens in a round."""
    figures = {name: [figures[key] for figures in runs[name]] for name in runs}
    return {"section": section, "what": what, "unit": unit, "tokens": tokens, **figures}


def check(what, ours, theirs, limit):
    """Compare two numbers, for a row."""
    agree = {"what": what, "brisk": ours, "nanogpt": theirs, "limit": limit}
    return agree | {"difference": abs(ours - theirs), "holds": abs(ours - theirs) <= limit}


def summary(row):
    """Return the medians, the ratio nanoGPT / brisk over all rounds, and the spreads of a row."""
    ours, theirs = row["brisk"], row["nanogpt"]
    ratios = [n / b for b, n in zip(ours, theirs, strict=True)]
    medians = {"brisk": median(ours), "nanogpt": median(theirs)}
    spreads = {name: (max(row[name]) - min(row[name])) / medians[name] for name in medians}
    figures = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {"median": medians, **figures, "spread": spreads}


def as_lines(row):
    """Format a row with its `summary`, for the table below `HEAD`."""
    of = row["summary"]
    ours, theirs = (in_unit(of["median"][name], row["unit"]) for name in ("brisk", "nanogpt"))
    ratio = f"{of['ratio']:.2f} ({of['lowest']:.2f} to {of['highest']:.2f})"
    spreads = " ".join(f"{of['spread'][name]:.0%}" for name in ("brisk", "nanogpt"))
    what = f"{row['section']:<8}{row['what']}"
    lines = [f"{what:<46}{ours:>10}{theirs:>10}   {ratio:<27}{spreads}"]
    if row["tokens"]:
        rates = (row["tokens"] / of["median"][name] for name in ("brisk", "nanogpt"))
        lines.append(f"{'':<8}tokens/s: {', '.join(f'{rate:,.0f}' for rate in rates)}")
    if len(set(row.get("precision", {}).values())) > 1:
        lines.append(f"{'':<8}in {row['precision']['brisk']}, {row['precision']['nanogpt']}")
    if "check" in row:
        lines.append(f"{'':<8}{as_line(row['check'])}")
    return "\n".join(lines)


def as_line(check):
    numbers = f"{check['what']}: {check['brisk']:.6g}, {check['nanogpt']:.6g}"
    if check["holds"]:
        return numbers
    return f"{numbers}  <-- DIFFERENT by {check['difference']:.3g}, limit {check['limit']:g}"


def in_unit(figure, unit):
    if unit == "bytes":
        return format_bytes(figure)
    return f"{figure:.3g} s" if figure >= 1 else f"{figure * 1000:.3g} ms"
