"""A page of HTML in one file: its pictures are in it, and nothing is fetched or run."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from codir_fast.distillation.report.pictures import save

PIXELS_PER_INCH = 90  # of all pictures, so that their letters are of one size
# The policy makes a browser refuse what is not in the file, should anything ever get into it.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 75rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccc; }}
img {{ max-width: 100%; height: auto; }}
figure {{ margin: 1rem 0; }}
figcaption, .missing {{ color: #555; max-width: 50rem; }}
.scroll {{ overflow-x: auto; margin: .7rem 0; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border: 1px solid #ddd; padding: .2rem .6rem; text-align: left; vertical-align: top; }}
td {{ overflow-wrap: anywhere; min-width: 4rem; }}
thead th {{ background: #f2f2f2; }}
tbody th {{ font-weight: normal; }}
tr.differs th, tr.differs td {{ background: #fff3c4; }}
summary {{ cursor: pointer; margin: .7rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(title: str, sections: Mapping[str, Iterable[str]]) -> str:
    """The whole file.

    Args:
        title: plain text.
        sections: heading, plain text -> HTML as the functions below give it.
    """
    body = "\n".join(
        f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>"
        for heading, parts in sections.items()
    )
    return PAGE.format(title=escape(title), body=body)


def escape(text: Any) -> str:
    """Plain text as HTML that shows it."""
    return html.escape(str(text))


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """A sentence in the place of what could not be made."""
    return f'<p class="missing">{escape(text)}</p>'


def table(
    head: Sequence[str], rows: Mapping[str, Sequence[Any]], highlighted: Iterable[str] = ()
) -> str:
    """Rows of values under their names.

    Args:
        head: of the columns, the names' own first.
        rows: name -> values, of which None is an empty cell.
        highlighted: names of rows that catch the eye.
    """
    marked = set(highlighted)
    lines = ['<div class="scroll"><table>', _row("th", *head, group="thead"), "<tbody>"]
    for name, values in rows.items():
        cells = "".join(f"<td>{escape(_text(value))}</td>" for value in values)
        start = '<tr class="differs">' if name in marked else "<tr>"
        lines.append(f'{start}<th scope="row">{escape(name)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _row(cell: str, *texts: str, group: str) -> str:
    cells = "".join(f'<{cell} scope="col">{escape(text)}</{cell}>' for text in texts)
    return f"<{group}><tr>{cells}</tr></{group}>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    # With # the zeros at the end stay: a column's numbers have the same digits.
    return f"{value:#.4g}".removesuffix(".") if isinstance(value, float) else str(value)


def folded(summary: str, content: str) -> str:
    """Content that shows once its summary is chosen."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def figure(picture: Any, caption: str) -> str:
    """A picture of matplotlib, which is closed, with a sentence below that also stands for it where
    pictures are not seen.
    """
    width = round(PIXELS_PER_INCH * picture.get_figwidth())
    file = io.BytesIO()
    save(picture, file)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = escape(caption)
    return (
        f'<figure>\n<img alt="{text}" width="{width}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{text}</figcaption>\n</figure>"
    )
