"""`fastkd report --html`: one file that shows what the Markdown says, and nothing of it as markup."""

import base64
import re
from html.parser import HTMLParser

import pytest

from fastkd.cli import main
from fastkd.runs import html
from fastkd.runs.config import to_yaml
from fastkd.train import TrainConfig
from fastkd.train.metrics import write_csv

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


class Checker(HTMLParser):
    """The tags of a page, and whether each is closed."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_kinds_of_a_report(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    text = "# ti\n\nOne,\ntwo `x < y`.\n\n| a | b |\n| :- | -: |\n| 1 | **2** |\n\n- i\n- ii\n\n"
    text += "```\na  # b\n```\n\n![pic](a.png)"
    body = html.body(text, tmp_path)
    assert "<h1>ti</h1>" in body and "<p>One, two <code>x &lt; y</code>.</p>" in body
    assert '<td style="text-align: left">1</td><td style="text-align: right"><b>2</b></td>' in body
    assert "<ul><li>i</li><li>ii</li></ul>" in body and "<pre>a  # b</pre>" in body
    assert base64.b64encode(PNG).decode() in body
    assert Checker(body).open == []


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", '"><img src=x onerror=y>', "![x](../secret.png)"])
def test_names_are_no_markup(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "run").mkdir()
    body = html.body(
        f"# {name}\n\n| {name} |\n| - |\n| `{name}` |\n\n- {name}\n\n```\n{name}\n```\n\n![{name}](x.png)",
        tmp_path / "run",
    )
    seen = Checker(body).seen
    assert not {"script", "img"} & set(seen)


def test_a_picture_that_is_not_there_is_its_words(tmp_path):
    assert html.body("![loss & accuracy](gone.png)", tmp_path) == "<p><em>loss &amp; accuracy</em></p>"


def a_run(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(TrainConfig(method="kd", epochs=3, out=str(folder))))
    write_csv(folder / "metrics.csv", [{"epoch": 1, "train_loss": 1.5, "test_accuracy": 0.5, "seconds": 1.0}])
    return folder


def test_of_a_run(tmp_path, capsys):
    run = a_run(tmp_path / "a <b>")
    assert main(["report", str(run), "--html"]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    assert page.count('src="data:image/png;base64,') == 1 and not re.search(r'src="(?!data:)|href=', page)
    assert "a &lt;b&gt;" in page and "a <b>" not in page and "1 of 3" in page


def test_of_several_runs_and_of_a_finished_comparison(tmp_path, capsys):
    runs = [str(a_run(tmp_path / name)) for name in "ab"]
    assert main(["report", *runs, "--html", "--out", str(tmp_path / "both")]) == 0
    assert "2 runs" in (tmp_path / "both/report.html").read_text()
    compared = tmp_path / "compared"
    compared.mkdir()
    (compared / "results.csv").touch()
    (compared / "report.md").write_text("# ce, kd on digits\n\n![bars](comparison.png)\n")
    (compared / "comparison.png").write_bytes(PNG)
    assert main(["report", str(compared), "--html"]) == 0
    assert base64.b64encode(PNG).decode() in (compared / "report.html").read_text()
