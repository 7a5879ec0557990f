"""Pages in a real browser, and what is measured in them."""

from __future__ import annotations

import shutil

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; .ci/run installs Debian's")

OVERFLOWING = """() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (!e.closest(".scroll") && box.width && (box.right > width + 1 || box.left < -1)) found.push(e.outerHTML.slice(0, 80));
  }
  return {page: document.documentElement.scrollWidth > width, found};
}"""
# Contrast of text with what lies behind it (WCAG 2.1): relative luminance of both, as a ratio.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  let worst = 99;
  for (const e of document.querySelectorAll("p, td, th, button, select, textarea, h1, h2, h3, dt, dd, b, i, span, small, summary")) {
    if (!e.innerText || !e.innerText.trim()) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    worst = Math.min(worst, (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
  }
  return worst;
}"""
