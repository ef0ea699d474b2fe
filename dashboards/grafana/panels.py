"""Rows and panels, each kind in one look, and the dashboard around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# The builder of any kind of panel: they have no base of their own.
Panel = Any

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

# That of Grafana 11, the oldest that is meant: newer ones bring a dashboard up to date themselves.
_SCHEMA = 39

_DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")


class Query(NamedTuple):
    """One query of a panel, and the name of what it gives."""

    expr: str
    legend: str = "{{instance}}"


class Row(NamedTuple):
    """A question, and the panels that answer it, from left to right."""

    title: str
    panels: Sequence[Panel]


def stat_panel(
    title: str, description: str, unit: str, query: Query, *, width: int, steps: Sequence[tuple[float | None, str]] = ()
) -> Panel:
    """A number as it is now, never as it was last seen; with ``steps`` its background says whether it is right."""
    panel = stat.Panel().with_target(_target(query).instant())
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.graph_mode(common_models.BigValueGraphMode.NONE)
    if steps:
        panel.thresholds(thresholds(steps)).color_mode(common_models.BigValueColorMode.BACKGROUND)
    else:
        panel.color_scheme(_fixed(BLUE)).color_mode(common_models.BigValueColorMode.VALUE)
    return _framed(panel, title, description, unit, width, 5)


def graph(
    title: str, description: str, unit: str, *queries: Query, width: int, height: int = 8, exemplars: bool = False
) -> Panel:
    """Lines over time, with the largest first in the legend. Exemplars lead to the trace of what was measured."""
    panel = timeseries.Panel().targets([target.exemplar(exemplars) for target in _targets(queries)])
    panel.fill_opacity(8).show_points(common_models.VisibilityMode.AUTO).axis_soft_min(0)
    panel.legend(_legend())
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    return _framed(panel, title, description, unit, width, height)


def bars(title: str, description: str, query: Query, *, width: int) -> Panel:
    """How often something happened, as stacked bars: zeros take no room, and anything else stands out."""
    panel = graph(title, description, "short", query, width=width)
    panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(70)
    return panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))


def largest(title: str, description: str, unit: str, query: Query, *, width: int) -> Panel:
    """The largest names as horizontal bars."""
    panel = bargauge.Panel().with_target(_target(query).instant())
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.orientation(common_models.VizOrientation.HORIZONTAL).display_mode(common_models.BarGaugeDisplayMode.BASIC)
    panel.color_scheme(_fixed(BLUE)).min(0)
    return _framed(panel, title, description, unit, width, 9)


def timeline(
    title: str, description: str, *queries: Query, width: int, states: Sequence[models.ValueMapping], height: int = 6
) -> Panel:
    """Which state something was in, and when."""
    panel = statetimeline.Panel().targets(_targets(queries)).mappings(states)
    panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    panel.show_value(common_models.VisibilityMode.NEVER).merge_values(True).fill_opacity(80)
    return _framed(panel, title, description, "none", width, height)


def heat(title: str, description: str, query: Query, *, width: int) -> Panel:
    """How many observations took how long, with exemplars."""
    panel = heatmap.Panel().with_target(_target(query).format(PromQueryFormat.HEATMAP).exemplar(True))
    scale = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME)
    panel.color(scale.scheme("Oranges").exponent(0.5).steps(64)).filter_values(heatmap.FilterValueRange().le(1e-9))
    panel.y_axis(heatmap.YAxisConfig().unit("s")).cell_values(heatmap.CellValues().unit("ops"))
    panel.exemplars_color("rgba(87, 148, 242, 0.9)")
    return _framed(panel, title, description, "s", width, 8)


def listing(
    title: str,
    description: str,
    columns: Sequence[tuple[str, str, Query]],
    *,
    width: int,
    height: int,
    names: dict[str, str],
    hidden: Sequence[str] = (),
) -> Panel:
    """A table as it is now: a line for each set of labels, and a column for each query, with its heading and unit.

    ``names`` are the labels to show and their headings, in their order. The largest of the first column come first.
    """
    panel = table.Panel().targets(
        [target.instant().format(PromQueryFormat.TABLE) for target in _targets([query for _, _, query in columns])]
    )
    # A single query's column is called Value, those of several Value #A, Value #B and so on.
    values = [f"Value #{letter}" if len(columns) > 1 else "Value" for letter in _letters(columns)]
    headings = {**names, **{value: heading for value, (heading, _, _) in zip(values, columns, strict=True)}}
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": dict.fromkeys(["Time", "__name__", *hidden], True),
                "indexByName": {name: position for position, name in enumerate(headings)},
                "renameByName": headings,
            },
        )
    )
    for heading, unit, _ in columns:
        panel.override_by_name(heading, [models.DynamicConfigValue(id_val="unit", value=unit)])
    if "Value" not in hidden:
        panel.sort_by([common.TableSortByFieldState().display_name(columns[0][0]).desc(True)])
    return _framed(panel, title, description, "none", width, height)


def state(**texts: tuple[str, str]) -> models.ValueMapping:
    """What 0 and 1 mean, as ``zero=(text, colour)`` and ``one=(text, colour)``."""
    digits = {"zero": "0", "one": "1"}
    return models.ValueMap(
        options={
            digits[name]: models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (name, (text, colour)) in enumerate(texts.items())
        }
    )


def from_value_on(value: float, text: str, colour: str) -> models.ValueMapping:
    """What every number from this one on means."""
    result = models.ValueMappingResult(text=text, color=colour, index=0)
    return models.RangeMap(options=models.DashboardRangeMapOptions(from_val=value, result=result))


def with_states(panel: Panel, ref_id: str, mappings: Sequence[models.ValueMapping]) -> Panel:
    """Let one query's numbers mean something of their own."""
    return panel.override_by_query(ref_id, [models.DynamicConfigValue(id_val="mappings", value=list(mappings))])


def thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    """Colours from these values on; None is from the smallest on."""
    config: dashboard.ThresholdsConfig = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    config.steps([models.Threshold(value=value, color=colour) for value, colour in steps])
    return config


def dashboard_of(title: str, uid: str, description: str, rows: Iterable[Row], *, other: tuple[str, str]) -> Any:
    """A dashboard of these rows, with a link to the ``other``, which is given by its title and uid."""
    other_title, other_uid = other
    link = dashboard.DashboardLink(other_title).type(models.DashboardLinkType.LINK).url(f"/d/{other_uid}")
    builder = dashboard.Dashboard(title).uid(uid).description(description).tags(["savings-exporter"])
    builder.time("now-6h", "now").refresh("30s").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    builder.link(link.include_vars(True).keep_time(True).icon("dashboard")).variables(_variables())
    for row in rows:
        builder.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            builder.with_panel(panel)
    built = builder.annotations([]).build()
    built.schema_version = _SCHEMA
    # The library's default hides links in a menu.
    built.links[0].placement = None
    for number, panel in enumerate(built.panels, 1):
        panel.id_val = number
    return built


def _framed(panel: Panel, title: str, description: str, unit: str, width: int, height: int) -> Panel:
    return panel.title(title).description(description).unit(unit).span(width).height(height).datasource(_DATASOURCE)


def _target(query: Query) -> Any:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).datasource(_DATASOURCE).ref_id("A")


def _targets(queries: Sequence[Query]) -> list[Any]:
    return [_target(query).range().ref_id(letter) for query, letter in zip(queries, _letters(queries), strict=True)]


def _letters(items: Sequence[object]) -> str:
    return "ABCDEFGH"[: len(items)]


def _legend() -> Any:
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.TABLE).show_legend(True)
    legend.placement(common_models.LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"])
    return legend.sort_by("Max").sort_desc(True)


def _fixed(colour: str) -> Any:
    return dashboard.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color(colour)


def _variables() -> list[Any]:
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        _label_variable("job", "Job", "label_values(savings_build_info, job)"),
        _label_variable("instance", "Instance", 'label_values(savings_build_info{job=~"$job"}, instance)'),
    ]


def _label_variable(name: str, label: str, query: str) -> Any:
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(_DATASOURCE).current(everything)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*")
