"""An evaluation as one file that any browser shows: tables, plots, and how it was measured."""

from __future__ import annotations

from pathlib import Path

import jinja2

from transmla.checkpoint.disk import replace_text
from transmla.evaluate.report.plots import report_plots
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import report_tables_of
from transmla.evaluate.report.text_table import short_names

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; } tbody tr:hover { background: #f2f4f7; }
svg { max-width: 100%; height: auto; }
footer { margin-top: 3rem; color: #666; font-size: .85rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Compared with {{ source }}, which is the first in every table.</p>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table>
<thead><tr>{% for heading in table.headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for caption, svg in plots %}
<h2>{{ caption }}</h2>
<div class="wide">{{ svg | safe }}</div>
{% endfor %}
<footer>
<p>{{ report.dtype }} on {{ report.device }}; transmla {{ report.versions.transmla }}, torch
{{ report.versions.torch }}, transformers {{ report.versions.transformers }}.</p>
{% for name, text in texts %}<p>{{ name }}: {{ text.data.num_tokens }} tokens, {{ text.data.protocol }},
SHA-256 of the tokens {{ text.data.sha256 }}.</p>
{% endfor %}{% for name, model in models %}<p>{{ name }}: {{ model.fingerprint }}.</p>
{% endfor %}</footer>
</body>
</html>
"""


def write_html(report: EvalReport, path: Path) -> None:
    """Write the report as a page; nothing in it is fetched from anywhere.

    Raises:
        OutputError: it cannot be written.
    """
    # Where they lie on the machine that measured means nothing to others.
    source, *others = names = short_names([model.name for model in report.models])
    texts = short_names([text.data.dataset for text in report.texts]) if report.texts else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(_PAGE).render(
        title=", ".join(others) or source,
        source=source,
        tables=list(report_tables_of(report)),
        plots=list(report_plots(report)),
        models=zip(names, report.models, strict=True),
        texts=zip(texts, report.texts, strict=True),
        report=report,
    )
    replace_text(path, page)
