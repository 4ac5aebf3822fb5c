"""The committed results as Markdown: for the README and docs/speed.md."""

from __future__ import annotations

from typing import Any

QWEN3, MINILM = "qwen3-0.6b", "all-MiniLM-L6-v2"
VARIANTS = ("int8", "int8-block", "int4", "int4-small", "fp32", "q4")
README = ("int8", "int4", "int4-small", "fp32", "stock int8", "stock fp32", "openvino int8", "llama q8_0",
          "sentence-transformers")  # fmt: skip
SPEEDS = {"8x128": "8×128", "1x512": "1×512", "1x128": "1×128", "1x16": "1×16", "mixed": "mixed"}


def label(name: str) -> str:
    """A contender's name, ours with the package's."""
    ours = f"featherbed `{name}`" if name in VARIANTS else name
    return f"**{ours}**" if name == "int8" else ours


def ran(result: dict[str, Any]) -> dict[str, Any]:
    """Contenders with figures, in the order of the run, the wall aside."""
    return {k: v for k, v in result["results"].items() if k != "wall" and v.get("workloads")}


def number(value: float | None, digits: int = 0) -> str:
    """For a cell: empty where nothing was measured."""
    return "" if value is None else f"{value:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def speeds(found: dict[str, Any], lines: list[str]) -> list[str]:
    """Tokens a second, a cell a workload."""
    return [number(found["workloads"].get(line, {}).get("tokens_per_s")) for line in lines]


def on(result: dict[str, Any]) -> str:
    """The machine and the commit, in words."""
    m = result["machine"]
    return (
        f"{m['cores']} cores of {m['cpu']} ({', '.join(m['flags'])}), onnxruntime {m['onnxruntime']}, "
        f"commit {result['commit'][:7]}"
    )


def short(engine: dict[str, Any]) -> str:
    """The README's: whom people ask about."""
    found = ran(engine[QWEN3])
    lines = [line for line in SPEEDS if line in engine[QWEN3]["workloads"]]
    rows = [
        [label(name), number(one["size_bytes"] / 1e6), *speeds(one, lines), number(one["rss_mib"]),
         number(one["rss_private_mib"])]
        for name in README if (one := found.get(name))
    ]  # fmt: skip
    head = ["tokens/s", "MB", *(SPEEDS[line] for line in lines), "RSS MiB", "private MiB"]
    wall = engine["wall"]
    about = f"{on(engine)}; medians of rounds in turn, memory after batches of 8×128."
    if wall["tokens_per_s"]:
        about += (
            f" The INT8 matrix products alone run at {wall['gop_per_s']:.0f} GOP/s here: {wall['tokens_per_s']:.0f} "
            "tokens/s, if nothing else took time."
        )
    if engine["costs"]:
        fresh = ", ".join(f"`{name}` {one['rss_mib']:.0f}" for name, one in engine["costs"]["memory"].items())
        about += (
            " All processes wait for their turns, and the system may take mapped pages of ours back meanwhile: RSS of "
            f"fresh processes that never waited, in MiB, {fresh}."
        )
    return f"{markdown(head, rows)}\n\n{about}"


def full(engine: dict[str, Any], of: str) -> str:
    """Everyone who ran one model, and why the others did not."""
    result = engine[of]
    lines = [line for line in SPEEDS if line in result.get("workloads", {})]
    rows = []
    for name, one in ran(result).items():
        latency = one["workloads"].get("1x16", {})
        load = [number(one["load_s"], 1), number(one["ready_s"], 1), number(one["first_ready_s"], 1)]
        memory = [number(one[key]) for key in ("rss_mib", "rss_private_mib", "rss_file_mib")]
        percentiles = [number(latency.get(key), 1) for key in ("latency_p50_ms", "latency_p95_ms")]
        rows.append(
            [label(name), *speeds(one, lines), *percentiles, number(one["size_bytes"] / 1e6), *memory, *load,
             number(one["cosine_to_fp32"], 4)]
        )  # fmt: skip
    head = [
        "tokens/s", *(SPEEDS[line] for line in lines), "p50 ms 1×16", "p95 ms", "MB", "RSS MiB", "private", "file",
        "load s", "ready s", "first s", "cosine",
    ]  # fmt: skip
    others = {k: v for k, v in result["results"].items() if not v.get("workloads")}
    absent = [f"- {k}: {v.get('not_run') or v.get('failed')}" for k, v in others.items()]
    return "\n".join([markdown(head, rows), *(["", "Not run:", "", *absent] if absent else [])])


def compared(engine: dict[str, Any]) -> str:
    """The ratios of speeds, where both sides ran."""
    rows = []
    for name, by_shape in engine["ratios"].items():
        if any(by_shape.values()):
            rows.append([name, *(number(by_shape.get(line), 2) for line in SPEEDS)])
    return markdown(["speed ÷ speed", *SPEEDS.values()], rows)


def versions(engine: dict[str, Any]) -> str:
    """Each library once."""
    found = {v["version"] for of in (QWEN3, MINILM) for v in ran(engine[of]).values()}
    return ", ".join(sorted({part for words in found for part in words.split(", ")}))


def spent(engine: dict[str, Any]) -> str:
    """What the engine takes beside time; nothing where it was not asked."""
    found = engine["costs"]
    if not found:
        return ""
    prompt, pool, processes = found["prompt"], found["pool"], found["processes"]
    rows = [
        [f"`{name}`: RSS · private · PSS after whole-vocabulary batches of 1,024 tokens",
         f"{one['rss_mib']:.0f} · {one['rss_private_mib']:.0f} · {one['pss_mib']:.0f} MiB"]
        for name, one in found["memory"].items()
    ]  # fmt: skip
    rows += [
        ["pool of 4 ÷ 1, RSS", f"{pool['rss_ratio']:.2f}"],
        ["4 processes ÷ 1, PSS", f"{processes['ratio']:.2f}"],
        [f"a query behind a kept prompt of {prompt['prompt_tokens']} tokens ÷ without, latency",
         f"{prompt['kept_ms']:.0f} ÷ {prompt['plain_ms']:.0f} ms = {prompt['ratio']:.2f}"],
        ["the vectors of both", "the same, bit for bit" if prompt["same_vectors"] else "not the same bits"],
        ["start of Python to the first vector, `int8`", f"{found['cold_start_s']['median']:.2f} s"],
        [f"one text of {found['long_text']['tokens']} tokens: time, peak RSS",
         f"{found['long_text']['seconds']:.0f} s, {found['long_text']['rss_peak_mib']:.0f} MiB"],
    ]  # fmt: skip
    if many := found["many_texts"]:
        rows.append(
            ["`featherbed embed`, MiniLM, 100,000 ÷ 1,000 texts: texts/s, peak RSS",
             f"{many['speed_ratio']:.2f}, {many['rss_ratio']:.2f}"]
        )  # fmt: skip
    return f"### Beside time\n\n{markdown(['the 0.6B shape', 'found'], rows)}"


def page(engine: dict[str, Any]) -> str:
    """docs/speed.md, between its markers."""
    parts = [
        f"{on(engine)}. {versions(engine)}.",
        f"### The shape of Qwen3-Embedding-0.6B\n\n{full(engine, QWEN3)}",
        f"### all-MiniLM-L6-v2\n\n{full(engine, MINILM)}" if engine[MINILM]["results"] else "",
        f"### Ratios\n\n{compared(engine)}",
        spent(engine),
    ]
    return "\n\n".join(part for part in parts if part)


def cost(job: dict[str, Any]) -> str:
    """What the files cost to make."""
    build = job["build"]
    ours, stock = build["featherbed"], [v for k, v in build.items() if k.startswith("stock")]
    rows = [
        ["**featherbed**", f"{ours['seconds']:.0f} s", f"{ours['private_peak_mib'] / 1024:.2f} GiB"],
        ["stock", f"{sum(v['seconds'] for v in stock):.0f} s",
         f"{max(v['private_peak_mib'] for v in stock) / 1024:.2f} GiB"],
    ]  # fmt: skip
    if four := build.get("featherbed int4"):
        private = f"{four['private_peak_mib'] / 1024:.2f} GiB"
        rows.append(["featherbed fp32 and `int4`, calibrated and compensated", f"{four['seconds']:.0f} s", private])
    head = ["fp32, int8-dynamic and q4, unverified", "made in", "peak private memory"]
    return f"{markdown(head, rows)}\n\n{on(job)}."
