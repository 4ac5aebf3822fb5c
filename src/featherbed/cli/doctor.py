"""featherbed doctor"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featherbed.cli.options import JsonFlag, print_json, print_table
from featherbed.progress import bar

if TYPE_CHECKING:
    from featherbed.pipeline.doctor import Finding


def command(
    model: Annotated[str, typer.Argument(help="A model folder or Hub id to choose a variant of.", metavar="DIR")] = "",
    mend: Annotated[
        bool,
        typer.Option("--mend", help="Take away what is broken, unfinished or useless; fetch again what is broken."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say what this machine has, which variant of a model it should take and why, and what is broken in the caches.

    Every file that was fetched is compared with its hash. Exit code 1 when something is broken and was not mended.
    """
    from featherbed.pipeline import doctor

    here = doctor.surroundings()
    chosen = doctor.advice(model) if model else None
    with bar() as progress:
        findings = list(doctor.examine(progress))
        taken, failed = doctor.mend(findings, progress) if mend else (0, {})
    broken = any(one.broken for one in findings) and (not mend or bool(failed))
    if as_json:
        advice = None if chosen is None else {**vars(chosen), "candidates": [vars(one) for one in chosen.candidates]}
        told = [
            {
                "where": one.where,
                "what": one.what,
                "remedy": one.remedy,
                "broken": one.broken,
                "mended": mend and (one.again is None or one.again[0] not in failed),
            }
            for one in findings
        ]
        print_json(
            {
                "machine": here,
                "advice": advice,
                "findings": told,
                "taken_bytes": taken,
                "failed": [str(one) for one in failed.values()],
            }
        )
    else:
        _print_machine(here)
        if chosen is not None:
            _print_advice(model, chosen)
        elif model:
            typer.echo(f"\n{model}: a checkpoint, which has no variants yet: `featherbed build {model}`")
        typer.echo("")
        _print_findings(findings)
        if mend:
            typer.echo(f"mended: {len(findings)} things, {taken / 1e6:.1f} MB taken away")
            for error in failed.values():
                typer.echo(f"not fetched again: {error}")
        elif findings:
            typer.echo("`featherbed doctor --mend` mends these")
        else:
            typer.echo("nothing is wrong in the caches")
    if broken:
        raise typer.Exit(1)


def _print_findings(findings: Sequence[Finding]) -> None:
    """Each that is broken, and how many there are of each kind that is not."""
    for one in findings:
        if one.broken:
            typer.echo(f"broken: {one.where}: {one.what}; {one.remedy}")
    kinds = dict.fromkeys((one.what, one.remedy) for one in findings if not one.broken)
    for what, remedy in kinds:
        alike = [one for one in findings if (one.what, one.remedy) == (what, remedy) and not one.broken]
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        size = sum(one.size_bytes for one in alike) / 1e6
        typer.echo(f"note: {alike[0].where}{more}, {size:.1f} MB: {what}; {remedy}")


def _print_machine(here: dict[str, Any]) -> None:
    typer.echo(f"{here['cpu']}, {here['cores']} cores, {', '.join(here['flags']) or 'no flags that count'}")
    typer.echo(f"memory: {here['memory_mib']:,} MiB, {here['available_mib']:,} available")
    versions = ", ".join(f"{name} {found}" for name, found in here["versions"].items())
    typer.echo(f"featherbed {here['featherbed']}, Python {here['python']} on {here['system']}: {versions}")
    typer.echo(f"providers of onnxruntime: {', '.join(here['providers'])}")
    for name, place in here["caches"].items():
        state = "" if place["writable"] else ", not writable"
        sizes = f"{place['size_bytes'] / 1e6:,.1f} MB, {place['free_bytes'] / 1e9:,.1f} GB free{state}"
        typer.echo(f"cache of {name}: {place['path']}: {sizes}")
    hub = here["hub"]
    token = "with a token" if hub["token"] else "no token"
    typer.echo(f"Hub: {hub['endpoint']}, {token}{', offline mode' if hub['offline'] else ''}")


def _print_advice(model: str, chosen: Any) -> None:
    rows = [
        [
            f"{one.name} ←" if one.name == chosen.variant else one.name,
            f"{one.size_bytes / 1e6:.1f}",
            "–" if one.cos_min is None else f"{one.cos_min:.4f}",
            "–" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
            one.out or "–",
        ]
        for one in chosen.candidates
    ]
    typer.echo("")
    print_table(
        f"{model}: take {chosen.variant}",
        ["variant", "MB", "worst cosine", "tokens/s on this kind of CPU", "out, because it"],
        rows,
    )
    for reason in chosen.reasons:
        typer.echo(f"- {reason}")
    if chosen.auto != chosen.variant:
        typer.echo(f'- "auto" takes {chosen.auto}: name {chosen.variant} with --variant')
