"""``savings-exporter assets``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from savings_exporter.assets.files import asset_files, read_settings
from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.manual import manual_files
from savings_exporter.cli.options import NAMED_PATH, option
from savings_exporter.escaping import plain
from savings_exporter.service import logs


@click.command()
@click.option(
    "--output", metavar="DIR", type=NAMED_PATH, required=True, help="Where to write; it is created if needed."
)
@click.option("--force", is_flag=True, help="Replace files that have other contents.")
@click.option(
    "--settings",
    "settings_file",
    metavar="PATH",
    type=NAMED_PATH,
    help="YAML with thresholds, objectives and addresses.",
)
@click.option("--selector", metavar="MATCHERS", help="Label matchers of the exporters, such as 'namespace=\"llm\"'.")
@click.option("--job", metavar="NAME", help="The job under which Prometheus scrapes the exporters.")
@option("--runbook-url", variable="RUNBOOK_URL", metavar="URL", help="Where people reach an exporter's /docs/runbook.")
def assets(
    output: str,
    force: bool,
    settings_file: str | None,
    selector: str | None,
    job: str | None,
    runbook_url: str | None,
) -> None:
    """Write rules, dashboards, documents and files for deployment.

    The rules and dashboards are for your labels, thresholds and addresses.
    """
    logs.be_quiet()
    found = read_settings(settings_file, selector=selector, job=job, runbook_url=runbook_url)
    contents = asset_files(found)
    for path, text in manual_files(click.get_current_context().find_root().command).items():
        contents[f"deploy/{path}"] = text.encode()
    files = {Path(output, path): content for path, content in contents.items()}
    try:
        # All are compared before the first is written.
        edited = [target for target, content in files.items() if target.exists() and _content(target) != content]
        if edited and not force:
            more = f" (and {len(edited) - 1} more files)" if len(edited) > 1 else ""
            raise CommandError(
                f"{edited[0]}{more}: has other contents, so nothing was written. Name another directory, or give "
                "--force to replace it"
            )
        for target, content in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            print(target)
        # Not on standard output, which is the list of files.
        print(plain(f"{Path(output, 'docs/deploy.md')} says how to use these files"), file=sys.stderr)
    except OSError as error:
        raise CommandError(f"{error.filename}: cannot be written: {error.strerror}. Choose another --output") from None


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise CommandError(f"{path}: is not a regular file; remove it, or name another directory")
    return path.read_bytes()
