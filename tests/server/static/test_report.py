"""The training report of an adapter."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from tests.server.static.conftest import Visit
from tests.server.static.stand_in import training_report


def test_the_loss_curve_is_drawn(visit: Visit) -> None:
    page = visit.page
    visit.server.reports["shop"] = training_report(steps=120)
    page.get_by_role("button", name="Training").click()
    expect(page.get_by_role("dialog", name="Training of shop")).to_be_visible()
    for name, count in {"train": 120, "mean": 120, "validation": 6, "rate": 120}.items():
        points = page.locator(f"polyline.{name}").get_attribute("points") or ""
        assert len(points.split()) == count, name
    heights = [
        float(point.split(",")[1]) for point in (page.locator("polyline.mean").get_attribute("points") or "").split()
    ]
    assert heights[0] < heights[-1]  # the loss falls: down the page
    label = page.locator("svg.chart").get_attribute("aria-label") or ""
    assert re.fullmatch(r"Training loss from 2\.\d{3} to 1\.\d{3} \(running mean\) in 120 steps", label), label
    expect(page.locator(".figures div").first).to_have_text(re.compile("steps.*120", re.S))
    page.keyboard.press("Escape")
    expect(page.locator("#report")).to_be_hidden()


def test_the_curve_is_read_with_pointer_and_keys(visit: Visit) -> None:
    page = visit.page
    visit.server.reports["shop"] = training_report(steps=120)
    page.get_by_role("button", name="Training").click()
    page.focus("svg.chart")
    page.keyboard.press("End")
    expect(page.locator(".chart-said")).to_contain_text("step 120 · training 1.")
    expect(page.locator(".chart-said")).to_contain_text("validation 1.187")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".chart-said")).to_contain_text("step 119")
    page.keyboard.press("Home")
    expect(page.locator(".chart-said")).to_contain_text("step 1 · ")
    box = page.locator("svg.chart").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 100)
    expect(page.locator(".chart-said")).to_contain_text("step 120")
    expect(page.locator(".hair")).to_have_attribute("visibility", "visible")


def test_an_adapter_without_a_report_says_so(visit: Visit) -> None:
    visit.page.get_by_role("button", name="Training").click()
    expect(visit.page.locator("#report-body")).to_have_text("This adapter came without a training report.")


def test_the_base_model_has_none(visit: Visit) -> None:
    visit.page.select_option("#model-first", "smollm2-135m")
    expect(visit.page.get_by_role("button", name="Training")).to_be_disabled()


def test_odd_reports_are_drawn_as_far_as_they_go(visit: Visit) -> None:
    page = visit.page
    hostile = "<img src=x onerror=alert(1)>"
    odd = {
        "one step": {"metrics": [{"step": 1, "train_loss": 2.0, "learning_rate": 0}], "summary": {}},
        "constant": {"metrics": [{"step": s, "train_loss": 1.0} for s in (1, 2, 3)], "summary": None},
        "only validation": {"metrics": [{"step": 10, "val_loss": 1.5}], "summary": {hostile: hostile}},
        "nothing": {"metrics": [], "summary": {"labels": {"a": 1}, "none": None}},
        "not numbers": {"metrics": [{"step": "1", "train_loss": "x"}, None, 7, {"step": 2, "train_loss": None}]},
        "long": {"metrics": [{"step": s, "train_loss": 1 + 1 / s, "learning_rate": 1e-4} for s in range(1, 200_001)]},
    }
    visit.server.models += [{"id": name, "kind": "adapter"} for name in odd]
    visit.server.reports |= odd
    page.reload()
    expect(page.locator("#model-first")).to_be_enabled()
    for name in odd:
        page.select_option("#model-first", name)
        page.get_by_role("button", name="Training").click()
        drawn = "svg.chart" if name not in ("nothing", "not numbers") else "#report-body .hint"
        expect(page.locator(drawn)).to_be_visible()
        assert "NaN" not in page.locator("#report-body").inner_html(), name
        page.keyboard.press("Escape")
    assert page.locator("#report-body img").count() == 0


def test_a_long_run_is_thinned_and_keeps_its_spikes(visit: Visit) -> None:
    page = visit.page
    metrics = [{"step": s, "train_loss": 9.0 if s == 5_000 else 1.0} for s in range(1, 10_001)]
    visit.server.reports["shop"] = {"metrics": metrics, "summary": {}}
    page.get_by_role("button", name="Training").click()
    points = (page.locator("polyline.train").get_attribute("points") or "").split()
    assert 100 < len(points) <= 700
    heights = [float(point.split(",")[1]) for point in points]
    assert min(heights) < max(heights) - 100
