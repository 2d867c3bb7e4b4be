"""The report as a site: one page for each executed notebook and an index, readable without a network.

Pages hold their pictures as SVG, and their formulas as MathML, which browsers set by themselves. Where scripts may run,
assets/vega.js takes the pictures' places on the screen, to hover and to click; print and mail keep the still ones.
"""
from __future__ import annotations

import functools
import html
import json
import re
from pathlib import Path

from m2rl_core.pictures import picture
from m2rl_core.progress import duration
from m2rl_core.publishing.publish import CLAIM_KEYS
from m2rl_core.store import write_atomic

HEADLINES = ("headline", "figure2", "fig2", "figure9")  # the index shows the first of these that was made, or any
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word;
  font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b }
h1, h2, h3 { line-height: 1.25 } a { color: #0b57a4 } img { max-width: 100% }
table { border-collapse: collapse; font-size: .86rem; display: block; overflow-x: auto }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
pre { background: #f6f7f8; padding: .6rem .8rem; overflow-x: auto; font-size: .84rem; border-radius: 4px }
.jp-InputPrompt, .jp-OutputPrompt, .prompt, .anchor-link { display: none }
.supported, .completed, .holds { color: #14692f } .failed, .contradicted { color: #a3170f }
figure { margin: 0; overflow-x: auto } figure > svg { max-width: 100%; height: auto } figcaption { font-size: .8rem }
@media screen { .live > svg { display: none } } @media print { .live > div { display: none } }
.undecided, .not { color: #7a5d00 } nav { font-size: .9rem; color: #555 } .small { font-size: .85rem; color: #555 }
"""
# A picture becomes live when it comes near the window; without assets/vega.js (a page mailed alone) it stays as it is.
LIVE = """<script src="assets/vega.js"></script>
<script>
if (window.vegaEmbed) {
  const seen = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(entry => {
    const figure = entry.target, place = figure.insertBefore(document.createElement("div"), figure.firstChild);
    seen.unobserve(figure);
    const spec = JSON.parse(figure.querySelector("script").textContent);
    vegaEmbed(place, spec, {mode: "vega-lite", renderer: "svg", actions: false})
      .then(({view}) => {  // in charts of several panels Vega loses the first click on a legend: here it is
        const names = Object.keys(view.getState().signals).filter(name => name.endsWith("_legend"));
        names.forEach(name => view.signal(name, null, {force: true}));
        return view.runAsync();
      }).then(() => figure.classList.add("live"), error => { place.remove(); console.error(error) });
  }), {rootMargin: "300px"});
  document.querySelectorAll("figure.chart").forEach(figure => seen.observe(figure));
}
</script>"""
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?=\S)(?P<inline>[^$\n]+?)(?<=\S)\$(?!\d)", re.DOTALL)


def write(report: Path) -> list[Path]:
    """index.html and a page for each notebook of run.json; returns the pages written."""
    facts = json.loads((report / "run.json").read_text(encoding="utf-8"))
    pages = [report / f"{entry['name']}.ipynb" for entry in facts["notebooks"]]
    pages = [_notebook_page(path) for path in pages if path.is_file()]
    claims = report / "claims.json"
    verdicts = json.loads(claims.read_text(encoding="utf-8")) if claims.is_file() else []
    write_atomic(report / "index.html", _page(f"M2RL: the {facts['profile']} report", index(facts, verdicts, report)))
    if any("vega.js" in page.read_text(encoding="utf-8") for page in pages):
        (report / "assets").mkdir(exist_ok=True)
        write_atomic(report / "assets" / "vega.js", picture.script())
    return [*pages, report / "index.html"]


def index(facts: dict, verdicts: list[dict], report: Path) -> str:
    """The body of index.html: one figure, the notebooks, the verdicts, and what made them."""
    machine = facts["machine"]
    figure = _headline(report)
    tables = "".join(f'<li><a href="tables/{path.name}">{path.name}</a></li>'
                     for path in sorted((report / "tables").glob("*.csv")))
    return "\n".join([
        f"<h1>Mix or merge: the study at profile <code>{_text(facts['profile'])}</code></h1>",
        f'<h2>One figure</h2><img src="{figure}" alt="{Path(figure).stem}">' if figure else "",
        "<h2>Notebooks</h2>", notebook_table(facts["notebooks"], report),
        "<h2>Verdicts</h2>", verdict_table(sorted(verdicts, key=lambda claim: str(claim.get("section")))),
        f'<h2>Tables</h2><ul>{tables}</ul>' if tables else "",
        '<h2>What made this</h2>',
        f'<p class="small">Commit {_text(facts["commit"])}; {machine["cores"]} cores, {machine["memory_gb"]} GB, '
        f'{_text(machine["processor"])}, Python {_text(machine["python"])}; '
        '<a href="environment.txt">all packages</a>, <a href="claims.json">claims.json</a>.</p>',
    ])


def verdict_table(verdicts: list[dict]) -> str:
    """One row a claim: the paper's own data beside this run's verdict, with its interval and n.

    The claim leads to the cell that shows its numbers, the section to the verdict with its note and rows.
    """
    if not verdicts:
        return "<p>No claim was judged in this run.</p>"
    head = "".join(f"<th>{name}</th>" for name in
                   ("Section", "Claim and its rule", "Printed", "By the paper's numbers", "Here", "Estimate", "95 % interval",
                    "n"))
    rows = []
    for claim in verdicts:
        claim = {key: claim.get(key) for key in CLAIM_KEYS}
        interval = f"[{_number(claim['low'])}, {_number(claim['high'])}]" if claim["low"] is not None else ""
        kind = str(claim["run_verdict"] or "").split(" ")[0].rstrip(":,")
        cells = [claim["section"], claim["text"], claim["printed"], claim["paper_verdict"], claim["run_verdict"],
                 _number(claim["estimate"]), interval, claim["n"]]
        cells = [f"<td>{_text(cell)}</td>" for cell in cells]
        if claim["where"]:
            cells[0] = f'<td><a href="{_text(claim["where"]["verdict"])}">{_text(claim["section"])}</a></td>'
        cells[1] = f'<td>{_linked(claim)}<br><span class="small">{_text(claim["rule"])}</span></td>'
        needs = f'<br><span class="small">needs: {_text(claim["needs"])}</span>' if claim["needs"] else ""
        cells[4] = f'<td class="{_text(kind)}">{_text(claim["run_verdict"])}{needs}</td>'
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def notebook_table(entries: list[dict], report: Path) -> str:
    """One row a notebook: its page, how it ended and how long it took."""
    rows = []
    for entry in entries:
        made = entry["status"] != "not run" and (report / f"{entry['name']}.html").is_file()
        name = _text(entry["name"])
        link = f'<a href="{name}.html">{name}</a>' if made else name
        status = entry["status"] + (f": {entry['reason']}" if entry["reason"] else "")
        rows.append(f"<tr><td>{link}</td>"
                    f'<td class="{entry["status"].split()[0]}">{_text(status)}</td>'
                    f'<td>{duration(entry["seconds"]) if entry["seconds"] else ""}</td></tr>')
    head = "<th>Notebook</th><th>Status</th><th>Time</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _notebook_page(path: Path) -> Path:
    """<name>.html beside <name>.ipynb: cells, outputs and pictures."""
    import nbformat
    from pygments.formatters import HtmlFormatter
    notebook = nbformat.read(path, as_version=4)
    figures: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", ()):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = with_mathml(output.data["text/markdown"])
            if picture.MIME in output.get("data", {}):
                place = f"figure-{len(figures) + 1}-of-this-page"
                figures[place] = figure(output.data[picture.MIME], len(figures) + 1, path.parent)
                output.data = {"text/html": place}
    body, _ = _exporter().from_notebook_node(notebook)
    for place, drawn in figures.items():  # after the export, which writes all HTML anew and in small letters
        body = body.replace(place, drawn)
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    target = path.with_name(path.name.removesuffix(".ipynb") + ".html")
    nav = '<nav><a href="index.html">All notebooks</a></nav>'
    write_atomic(target, _page(path.stem, f"{nav}\n{body}" + (f"\n{LIVE}" if figures else ""), colours))
    return target


def figure(spec: dict, number: int, report: Path) -> str:
    """A picture as the page's `number`-th figure: still, its source for `LIVE`, and links to its files where published."""
    # Ids are the page's, not the picture's.
    still = re.sub(r'(\bid="|url\(#)(?=[\w-])', rf"\g<1>p{number}-", picture.svg(spec))
    data = json.dumps(spec, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    name = spec.get("usermeta", {}).get("figure", "")
    files = [f"{name}.svg", f"{name}.png", *(f"{name}{key.removeprefix('data')}.csv" for key in spec.get("datasets", {}))]
    links = " · ".join(f'<a href="figures/{file}">{_text(file)}</a>' for file in files
                       if name and (report / "figures" / file).is_file())
    return (f'<figure class="chart">{still}<script type="application/json">{data}</script>'
            + (f"<figcaption>{links}</figcaption>" if links else "") + "</figure>")


@functools.cache
def _exporter():
    """One for all pages: its templates take as long to compile as a page to write."""
    from nbconvert import HTMLExporter
    return HTMLExporter(template_name="basic")


def with_mathml(markdown: str) -> str:
    """The text with each $formula$ and $$formula$$ of TeX as MathML."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match) -> str:
        block = found["block"] is not None
        return convert(found["block"] if block else found["inline"], display="block" if block else "inline").replace("\n", " ")
    return FORMULA.sub(mathml, markdown)


def _page(title: str, body: str, style: str = "") -> str:
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head>'
            f"<body>\n{body}\n</body></html>\n")


def _headline(report: Path) -> str:
    there = sorted(path.stem for path in (report / "figures").glob("*.png"))
    chosen = next((name for name in HEADLINES if name in there), there[0] if there else "")
    return f"figures/{chosen}.png" if chosen else ""


def _linked(claim: dict) -> str:
    """The claim's text as a link to the cell that shows its numbers; reports of older code name no place."""
    place = claim["where"]
    text = _text(claim["text"])
    return f'<a href="{_text(place["notebook"])}.html#{_text(place["anchor"])}">{text}</a>' if place else text


def _number(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, int | float) else str(value)


def _text(value) -> str:
    return "" if value is None else html.escape(str(value))
