"""The report's page: its data as JSON, its style and its script, all in one file."""

from __future__ import annotations

import json
from datetime import datetime
from importlib import resources
from typing import Any

from distseg.report.panels import PANELS

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws its curves with JavaScript, which is switched off here.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def render(collected: dict[str, Any]) -> str:
    """The whole page; everything that a run wrote goes through JSON and is put in as text, never as
    HTML.
    """
    names = ", ".join(run["name"] for run in collected["runs"])
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    document = collected | {"panels": [panel.to_dict() for panel in PANELS], "made": made}
    data = json.dumps(document, allow_nan=False, default=str).replace("<", "\\u003c")
    title = f"distseg: {names}".replace("&", "&amp;").replace("<", "&lt;")
    script = '"use strict";\n(() => {\n' + _file("curves.js") + _file("sections.js") + "})();\n"
    return _PAGE.format(title=title, style=_file("page.css"), script=script, data=data)


def _file(name: str) -> str:
    return resources.files("distseg.report").joinpath(name).read_text(encoding="utf-8")
