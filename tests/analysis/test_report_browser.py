"""The page in a real Chromium: nothing loaded, nothing cut off, legible on a phone and in the dark."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from comparison_cases import full

from hf_softpick.analysis.report_html import render_html

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=3000"
).split()

# Run inside the page, in a frame as wide as the screen in question; what it finds becomes text of the outer page.
PROBE = """
const view = document.defaultView, root = document.documentElement, found = {problems: []};
const say = (what, node) => found.problems.push(what + ': ' + (node.textContent || node.tagName).trim().slice(0, 60));
document.querySelectorAll('details').forEach(d => d.open = true);
found.width = view.innerWidth; found.scroll = root.scrollWidth;
found.page = view.getComputedStyle(document.body).backgroundColor;
found.requests = view.performance.getEntriesByType('resource').map(r => r.name);
const rgb = text => text.match(/[0-9.]+/g).map(Number);
const light = c => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return .2126 * f(c[0]) + .7152 * f(c[1]) + .0722 * f(c[2]); };
const contrast = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
const behind = node => { for (; node; node = node.parentElement) {
  const c = rgb(view.getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
  return [255, 255, 255]; };
found.lowest = 99; found.texts = 0; found.smallest = 99;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let t; t = walk.nextNode();) {
  const node = t.parentElement;
  if (!t.data.trim() || ['STYLE', 'SCRIPT', 'title'].includes(node.tagName)) continue;
  const style = view.getComputedStyle(node), svg = node.closest('svg');
  const ratio = contrast(rgb(svg ? style.fill : style.color), behind(node));
  found.lowest = Math.min(found.lowest, ratio); found.texts++;
  if (ratio < 4.5) say('contrast ' + ratio.toFixed(2), node);
  const box = node.getBoundingClientRect();
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const size = parseFloat(style.fontSize) * scale;
  found.smallest = Math.min(found.smallest, size);
  if (size < 8) say('text of ' + size.toFixed(1) + ' px', node);
  if (svg) { const frame = svg.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 ||
        box.bottom > frame.bottom + 1) say('text outside its figure', node); }
  else if (!node.closest('.scroll') && (box.right > view.innerWidth + 1 || box.left < -1))
    say('text off the page', node);
}
found.figures = 0;
document.querySelectorAll('svg').forEach(svg => { const box = svg.getBoundingClientRect(); found.figures++;
  if (box.width < 5 || box.height < 5) say('empty figure', svg); });
document.querySelectorAll('svg.chart').forEach(svg => {  // labels of one axis must not run into each other
  const boxes = [...svg.querySelectorAll('.tick:not([transform])')].map(t => [t, t.getBoundingClientRect()]);
  boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
      say('labels overlap, ' + a.textContent + ' and', b); })); });
document.querySelectorAll('.line').forEach(line => {
  const c = rgb(view.getComputedStyle(line).stroke);
  if (contrast(c, behind(line)) < 3) say('faint line', line.closest('svg')); });
found.dark = view.matchMedia('(prefers-color-scheme: dark)').matches;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    comparison = full(folder / "runs")
    comparison["runs"][0]["label"] = "a-run-with-a-name-of-more-than-forty-characters-without-spaces"
    return render_html(comparison)


def browse(path, *flags, timeout=60):
    with tempfile.TemporaryDirectory() as profile:
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def probe(page, folder: Path, width: int, dark: bool):
    """What PROBE finds on a copy of the page; the copy alone allows a script."""
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert copy != page
    # A headless window has a least width; a frame has none.
    frame = f'<iframe id="f" style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(copy)}"></iframe>'
    script = (
        "onload = () => { const out = document.getElementById('out'); try {"
        f"out.textContent = JSON.stringify(((document) => {{ {PROBE} return found; }})(f.contentDocument)); "
        "} catch (e) { out.textContent = JSON.stringify({problems: ['' + e.stack]}); } };"
    )
    outer = folder / "outer.html"
    scheme = "dark" if dark else "light"
    outer.write_text(
        f'<!DOCTYPE html><meta name="color-scheme" content="{scheme}"><body style="margin:0">{frame}'
        f'<pre id="out"></pre><script>{script}</script>',
        encoding="utf-8",
    )
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = browse(outer, "--dump-dom", "--enable-logging=stderr", f"--window-size={max(width, 500)},900", *flags)
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S).group(1)))
    found["console"] = re.findall(r".*CONSOLE.*", done.stderr)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_can_be_read(page, tmp_path, width, dark):
    found = probe(page, tmp_path, width, dark)
    assert found["problems"] == []
    assert found["console"] == [] and found["requests"] == []
    assert found["width"] == width and found["scroll"] <= width
    assert found["dark"] is dark
    assert (
        sum(map(int, re.findall(r"\d+", found["page"])[:3])) < 150 if dark else found["page"] == "rgb(255, 255, 255)"
    )
    assert found["texts"] > 300 and found["figures"] > 20 and found["lowest"] >= 4.5


@pytest.mark.parametrize(
    "damage, word",
    [
        ("body { width: 700px; }", "text off the page"),
        (".tick { fill: #999; }", "contrast"),
        ("svg.chart { height: 0; }", "empty figure"),
        (".axis { font-size: 60px; }", "outside its figure"),
        (".chart .tick { font-size: 40px; }", "labels overlap"),
        ("body { font-size: 6px; }", "px: "),
    ],
)
def test_the_probe_sees_what_is_wrong(page, tmp_path, damage, word):
    found = probe(page.replace("</style>", damage + "</style>"), tmp_path, 360, False)
    assert any(word in problem for problem in found["problems"]), found["problems"][:3]


def test_the_page_itself_runs_no_script_and_draws(page, tmp_path):
    """As it is delivered: a script that got in would be stopped by the policy, and a picture is not blank."""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", "<script>document.title = 'run'</script></body>"), encoding="utf-8")
    done = browse(path, "--dump-dom", "--enable-logging=stderr")
    assert "<title>run</title>" not in done.stdout and "Content Security Policy" in done.stderr
    path.write_text(page, encoding="utf-8")
    colours = {}
    for scheme, flags in {"light": [], "dark": ["--blink-settings=preferredColorScheme=0"]}.items():
        picture = tmp_path / f"{scheme}.png"
        browse(path, f"--screenshot={picture}", "--window-size=1000,1400", *flags)
        from matplotlib.image import imread

        pixels = imread(picture)[..., :3]
        assert pixels.std() > 0.05
        colours[scheme] = pixels.mean()
    assert colours["light"] > 0.85 and colours["dark"] < 0.25
