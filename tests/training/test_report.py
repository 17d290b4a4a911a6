import base64
import re

from alpaca_lora.training import report as module
from alpaca_lora.training.report import Report, SampleAnswer, loss_figure, smoothed, write_report

LOG = [
    {"step": 1, "train_loss": 3.0, "learning_rate": 1e-4},
    {"step": 2, "train_loss": 2.0, "learning_rate": 2e-4},
    {"step": 2, "val_loss": 2.5},
]


def report(**overrides) -> Report:
    fields = {
        "title": "a run",
        "summary": [("steps", "2", "of 2")],
        "log": LOG,
        "config": [("lora_r", "8", "default")],
        "rows": [("rows in", 1234, "")],
        "moved": {"model.layers.0.self_attn.q_proj": 0.5, "model.layers.1.self_attn.v_proj": 0.25},
        "samples": [SampleAnswer("<img src=x onerror=alert(1)>", "wanted & true", "answer\nwith two lines")],
    }
    return Report(**{**fields, **overrides})


def test_page_is_whole_and_fetches_nothing(tmp_path):
    write_report(tmp_path / "report.html", report())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1,234" in page and "lora_r" in page and "wanted &amp; true" in page
    assert "http:" not in page and "https:" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_texts_are_escaped(tmp_path):
    write_report(tmp_path / "report.html", report())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page


def test_loss_curve_shows_what_the_log_says():
    upper, lower = loss_figure(LOG).axes
    each, mean, validation = (line.get_xydata().tolist() for line in upper.lines)
    assert each == [[1, 3.0], [2, 2.0]] and validation == [[2, 2.5]]
    assert mean[0] == [1, 3.0] and 2.0 < mean[1][1] < 3.0
    assert lower.lines[0].get_ydata().tolist() == [1e-4, 2e-4]


def test_the_axis_says_what_the_loss_is_a_mean_over(tmp_path, monkeypatch):
    assert loss_figure(LOG).axes[0].get_ylabel() == "loss per token (nats)"
    assert loss_figure(LOG, "row").axes[0].get_ylabel() == "loss per row (nats)"
    drawn = []
    monkeypatch.setattr(module, "loss_figure", lambda log, per: drawn.append(per) or loss_figure(log, per))
    for per in ("token", "row"):
        write_report(tmp_path / "report.html", report(loss_per=per))
    assert drawn == ["token", "row"]


def test_run_without_steps_has_a_page_too(tmp_path):
    write_report(tmp_path / "report.html", report(log=[], moved={}, samples=[]))
    assert "Loss" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_running_mean_has_no_bias_at_its_start():
    assert smoothed([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]
