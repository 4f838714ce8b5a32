"""The page of a report: what surrounds its figures, as templates that escape whatever is put into them."""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import TYPE_CHECKING, Any

from ovtq.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2024; --soft: #667; --line: #d8dce0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e7ea; --soft: #9aa3ab; --line: #343a40; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.75rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 1rem; max-width: 60rem; } .soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } th.text, td.text { text-align: left; }
td.name { white-space: normal; min-width: 13rem; overflow-wrap: anywhere; font-weight: 600; }
th.name, td.name { position: sticky; left: 0; background: var(--paper); }
td.cache { white-space: normal; min-width: 10rem; color: var(--soft); }
tr.reference td, tr.floor td { color: var(--soft); font-weight: 400; }
.wrong { color: var(--bad); font-weight: 600; white-space: normal; }
figure { margin: 1rem 0 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; min-width: 34rem; }
section + section { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
@media (max-width: 40rem) { td.name { min-width: 8.5rem; } body { padding: 1.25rem .75rem 3rem; } }
@media print {
  body { max-width: none; padding: 0; } .scroll, figure { overflow: visible; } figure svg { min-width: 0; }
  table { font-size: 6.5pt; } td.name, td.cache { min-width: 0; } th.name, td.name { position: static; }
  tr, figure { break-inside: avoid; } }
"""

# A browser is to load nothing, run nothing, and take no other style than that one, whatever else gets into the page.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'"
)

TEMPLATES = {
    "page": """<!doctype html>
<html lang="en"><head><meta charset="utf-8">\
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">\
<meta name="viewport" content="width=device-width, initial-scale=1">\
<title>ovtq: {{ title }}</title><style>{{ style }}</style></head>
<body><h1>{{ title }}</h1>
{% for part in parts %}<section>{{ part }}</section>
{% endfor %}</body></html>
""",
    "table": """<div class="scroll"><table><thead><tr>\
{% for title, css in heads %}<th class="{{ css }}">{{ title }}</th>{% endfor %}</tr></thead><tbody>\
{% for kind, cells in rows %}<tr class="{{ kind }}">\
{% for css, cell in cells %}<td class="{{ css }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>""",
    "figure": "<figure>{{ picture }}<figcaption>{{ caption }}</figcaption></figure>",
    "evaluation": """<p class="soft">{{ made }}: quality on {{ run.device }}</p><h2>Quality</h2>\
<p>{{ total }} tokens of {{ run.text }} in windows of {{ window }}, read {{ run.chunk }} at a time. KLD is the \
divergence of the next-token distribution from that of the model as exported with a cache of f32, in nats; lower is \
better. The noise floor is the same model read in other chunks: nothing below it is a difference. Greedy text: how \
many tokens it stays the reference's, on average, and how many texts are so to their end.</p>""",
    "benchmark": """<p class="soft">{{ made }}: time and memory on {{ run.device }}, {{ machine.cpu }}, \
{{ machine.cores }} cores, {{ ram }} GiB</p>""",
    "prompts": "<h2>Prompts</h2><p>Medians; ratios are to the exported model's run beside it.</p>",
    "prompt": """<h3>{{ prompt }}</h3><p class="soft">{{ read }} + {{ new }} tokens, {{ runs }} runs</p>""",
    "contexts": """<h2>Over the context</h2><p>One decode step after so many tokens ({{ filled }}). Ratios are medians \
over blocks of steps, each to the exported model's block beside it: below 1 is faster.</p>""",
    "name": """{% for part in parts %}{{ part }}{% if not loop.last %}<wbr>{% endif %}{% endfor %}{{ note }}\
{% if reason %}<div class="wrong">{{ word }}: {{ reason }}</div>{% endif %}""",
    "verdict": """{% if wrong %}<span class="wrong">wrong</span>{% else %}{{ verdict }}{% endif %}""",
}


@functools.cache
def _templates() -> Environment:
    try:
        import jinja2
    except ImportError:
        raise InputError("a report needs jinja2: pip install 'ovtq[eval]'") from None
    return jinja2.Environment(
        loader=jinja2.DictLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, auto_reload=False
    )


def check() -> None:
    """Raise InputError if there is no jinja2."""
    _templates()


def render(name: str, **values: Any) -> Markup:
    """One of the templates with these values, all of them escaped but for what is such a piece of the page itself.

    Raises LookupError for a value that is not there.
    """
    import jinja2

    try:
        return picture(_templates().get_template(name).render(**values))
    except jinja2.UndefinedError as error:
        raise LookupError(str(error)) from None


def joined(parts: list[Markup]) -> Markup:
    """Pieces of the page one after the other."""
    from markupsafe import Markup

    return Markup("").join(parts)


def picture(text: str) -> Markup:
    """What was made here, element by element, and not of anybody's words, as a piece of the page."""
    from markupsafe import Markup

    return Markup(text)
