"""``savings-exporter assets``."""

from __future__ import annotations

from pathlib import Path

import click

from savings_exporter.assets.files import asset_files, read_settings
from savings_exporter.service import logs


@click.command()
@click.option("--output", metavar="DIR", required=True, help="Where to write; it is created if needed.")
@click.option("--settings", "settings_file", metavar="PATH", help="YAML with thresholds, objectives and addresses.")
@click.option("--selector", metavar="MATCHERS", help="Label matchers of the exporters, such as 'namespace=\"llm\"'.")
@click.option("--job", metavar="NAME", help="The job under which Prometheus scrapes the exporters.")
@click.option("--runbook-url", metavar="URL", help="Where people reach an exporter's /docs/runbook.")
def assets(
    output: str, settings_file: str | None, selector: str | None, job: str | None, runbook_url: str | None
) -> None:
    """Write Prometheus rules and Grafana dashboards for your labels and thresholds."""
    logs.be_quiet()
    found = read_settings(settings_file, selector=selector, job=job, runbook_url=runbook_url)
    for path, text in asset_files(found).items():
        target = Path(output, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(target)
