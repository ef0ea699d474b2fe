"""Builders of rows, panels and dashboards. All panels of one kind have the same style."""

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

from queries import SELECTOR, of_instances

# The builder of any kind of panel. The builders have no common base class.
Panel = Any

GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

# The schema of Grafana 11, the oldest supported version. Newer versions upgrade a dashboard themselves.
_SCHEMA = 39

_DATASOURCE = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")


class Query(NamedTuple):
    """One query of a panel, and the legend of its result."""

    expr: str
    legend: str = "{{instance}}"


class Row(NamedTuple):
    """A row: its title is a question, and its panels answer it, from left to right."""

    title: str
    panels: Sequence[Panel]


def stat_panel(
    title: str, description: str, unit: str, query: Query, *, width: int, steps: Sequence[tuple[float | None, str]] = ()
) -> Panel:
    """A current value, never an outdated one. With ``steps`` the colour of the background shows whether it is good."""
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
    """Lines over time, with the largest first in the legend. Each exemplar links to the trace of its measurement."""
    panel = timeseries.Panel().targets([target.exemplar(exemplars) for target in _targets(queries)])
    panel.fill_opacity(8).show_points(common_models.VisibilityMode.AUTO).axis_soft_min(0)
    panel.legend(_legend())
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    return _framed(panel, title, description, unit, width, height)


def bars(title: str, description: str, query: Query, *, width: int) -> Panel:
    """The number of events as stacked bars: zeros are invisible, and other values are easy to see."""
    panel = graph(title, description, "short", query, width=width)
    panel.draw_style(common_models.GraphDrawStyle.BARS).fill_opacity(70)
    return panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))


def largest(title: str, description: str, unit: str, query: Query, *, width: int) -> Panel:
    """The names with the largest values, as horizontal bars."""
    panel = bargauge.Panel().with_target(_target(query).instant())
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.orientation(common_models.VizOrientation.HORIZONTAL).display_mode(common_models.BarGaugeDisplayMode.BASIC)
    panel.color_scheme(_fixed(BLUE)).min(0)
    return _framed(panel, title, description, unit, width, 9)


def timeline(
    title: str, description: str, *queries: Query, width: int, states: Sequence[models.ValueMapping], height: int = 6
) -> Panel:
    """States over time."""
    panel = statetimeline.Panel().targets(_targets(queries)).mappings(states)
    panel.color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
    panel.show_value(common_models.VisibilityMode.NEVER).merge_values(True).fill_opacity(80)
    return _framed(panel, title, description, "none", width, height)


def heat(title: str, description: str, query: Query, *, width: int) -> Panel:
    """The distribution of durations over time, with exemplars."""
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
    """A table of current values: a line for each set of labels, and a column for each query, with its heading and unit.

    ``names`` maps the labels to show to their headings, in display order. The lines are sorted by the first column,
    the largest value first.
    """
    panel = table.Panel().targets(
        [target.instant().format(PromQueryFormat.TABLE) for target in _targets([query for _, _, query in columns])]
    )
    # Grafana names the column of a single query Value, and those of several queries Value #A, Value #B and so on.
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
    """A mapping of 0 and 1, given as ``zero=(text, colour)`` and ``one=(text, colour)``."""
    digits = {"zero": "0", "one": "1"}
    return models.ValueMap(
        options={
            digits[name]: models.ValueMappingResult(text=text, color=colour, index=index)
            for index, (name, (text, colour)) in enumerate(texts.items())
        }
    )


def from_value_on(value: float, text: str, colour: str) -> models.ValueMapping:
    """A mapping of all values from ``value`` upwards."""
    result = models.ValueMappingResult(text=text, color=colour, index=0)
    return models.RangeMap(options=models.DashboardRangeMapOptions(from_val=value, result=result))


def with_states(panel: Panel, ref_id: str, mappings: Sequence[models.ValueMapping]) -> Panel:
    """Give the values of one query their own mappings."""
    return panel.override_by_query(ref_id, [models.DynamicConfigValue(id_val="mappings", value=list(mappings))])


def thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    """Colours from these values upwards; None is the base colour for the smallest values."""
    config: dashboard.ThresholdsConfig = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE)
    config.steps([models.Threshold(value=value, color=colour) for value, colour in steps])
    return config


def dashboard_of(title: str, uid: str, description: str, rows: Iterable[Row], *, other: tuple[str, str]) -> Any:
    """A dashboard of these rows, with a link to the ``other`` dashboard, which is given by its title and uid."""
    other_title, other_uid = other
    link = dashboard.DashboardLink(other_title).type(models.DashboardLinkType.LINK).url(f"/d/{other_uid}")
    builder = dashboard.Dashboard(title).uid(uid).description(description).tags(["savings-exporter"])
    builder.time("now-6h", "now").refresh("30s").timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    builder.link(link.include_vars(True).keep_time(True).icon("dashboard")).variables(_variables())
    for row in rows:
        builder.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            builder.with_panel(panel)
    built = builder.readonly().annotations(_annotations()).build()
    built.schema_version = _SCHEMA
    # By default the library hides links and annotations in a menu.
    for shown in (*built.links, *built.annotations.list_val):
        shown.placement = None
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


def _annotations() -> list[Any]:
    """Marks on every graph: what explains a jump in it."""
    restarts = "changes(process_start_time_seconds{%s}[$__rate_interval]) > 0 and ignoring (version, python_version) %s"
    marks = (
        ("Restarts", BLUE, restarts % (SELECTOR, of_instances("savings_build_info")), "{{instance}} restarted"),
        ("Fire drills", ORANGE, f"{of_instances('savings_drill_active')} == 1", "{{instance}}: drill {{drill}}"),
        (
            "Recoveries",
            RED,
            f"increase({of_instances('savings_recoveries_total')}[$__rate_interval]) > 0",
            "{{instance}} repaired its store: {{kind}}",
        ),
    )
    return [
        dashboard.AnnotationQuery()
        .name(name)
        .enable(True)
        .icon_color(colour)
        .datasource(_DATASOURCE)
        .expr(expr)
        .title_format(name)
        .text_format(text)
        .use_value_for_time(False)
        for name, colour, expr, text in marks
    ]


def _label_variable(name: str, label: str, query: str) -> Any:
    everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(_DATASOURCE).current(everything)
    variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".+")
