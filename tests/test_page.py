"""Samples, the page and stages alone: names, escaped text, and the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import bad_material
from evaluate import listen, page, reference, stages
from support import audio, common, flags
import train
from test_train import SMALL, lines

HERE = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<script>document.title="evil"</script><img src=x onerror="document.title=`evil`">'


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two short epochs, with samples and an evaluation after each."""
    out = tmp_path_factory.mktemp("page") / "toy"
    assert train.main([*SMALL, "--generate_every", "1", "--evaluate_every", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture()
def evil(finished, tmp_path):
    """A copy of the run whose captions and settings are HTML."""
    out = shutil.copytree(finished, tmp_path / "a&b")
    for path in out.glob("samples/*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompt": EVIL}))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "args": {**config["args"], EVIL: EVIL}}))
    return out


# ------------------------------------------------------------------------------------------------------------
# samples


def test_samples_have_the_same_names_every_epoch(finished):
    first, second = ({p.name for p in (finished / "samples" / f"epoch_000{i}").iterdir()} for i in (1, 2))
    assert first == second and len(first) == 2 * 3 * 2
    paths = (finished / "samples" / "epoch_0002").glob("*.json")
    records = {p.stem: json.loads(p.read_text()) for p in paths}
    assert records["000_unprompted"]["given"] == ["text"] and records["000_unconditional"]["given"] == []
    assert records["001_prompted"]["prompt_seconds"] == 0.4 and records["001_prompted"]["epoch"] == 2
    assert "BS.1770" in records["000_prompted"]["loudness"]
    assert len({r["prompt"] for r in records.values()}) == 2


def test_a_prompted_sample_begins_as_its_reference(finished):
    """Its first quarter is the reference's through the codec, up to loudness; the rest is not."""
    read = lambda name: audio.read_audio(finished / "samples" / name)[0]
    for i in (0, 1):
        made = read(f"epoch_0002/00{i}_prompted.wav")
        real, other = read(f"reference/00{i}_codec.wav"), read(f"reference/00{1 - i}_codec.wav")
        alike = [float(torch.corrcoef(torch.stack([made[:5000], x[:5000]]))[0, 1]) for x in (real, other)]
        assert alike[0] > 0.9 > abs(alike[1]), alike


def test_evaluation_compares_with_validation_clips(finished):
    found = [r for r in lines(finished) if r["stage"] == "evaluate"][-1]["distances"]
    assert {"fad_codec", "fad_mel", "kl_tempo"} <= found.keys()
    assert set(found["fad_mel"]) == {"generated", "ceiling", "training", "floor"}
    assert 0 < found["fad_codec"]["ceiling"] < found["fad_codec"]["generated"]
    assert found["fad_mel"]["training"] > 0.01, "these are the validation clips themselves"


def test_a_stage_alone(finished, capsys):
    """It gives the figures of the run, and touches neither log nor checkpoint."""
    names = ("log.jsonl", "last.pt", "best.pt", "config.json", "index.html")
    kept = {name: (finished / name).read_bytes() for name in names}
    records = lines(finished)
    for only in ("valid", "evaluate"):
        assert train.main(["--only", only, "--out", str(finished)]) == 0
        out = capsys.readouterr().out
        then = common.flatten_numbers([r for r in records if r["kind"] == "stage" and r["stage"] == only][-1])
        figures = dict(re.findall(rf"^{only} (\S+) (\S+)$", out, re.M))
        assert {"ce", "ce_q4"} <= figures.keys()
        assert only == "valid" or "distances/fad_mel/generated" in figures
        for name, value in figures.items():
            if name != "seconds":
                assert float(value) == pytest.approx(then[name], rel=1e-4, abs=1e-4), name
    assert train.main(["--only", "generate", "--generate_samples", "1", "--out", str(finished)]) == 0
    written = {p.name for p in (finished / "samples" / "best").glob("*.wav")}
    assert written == {f"000_{kind}.wav" for kind in listen.SAMPLE_KINDS}
    shutil.rmtree(finished / "samples" / "best")
    assert kept == {name: (finished / name).read_bytes() for name in kept}


def test_evaluation_is_the_same_on_two_ranks(finished):
    """Figure for figure, but for the rounding of sums; 18 clips are two batches, one for each rank."""
    alone = [sys.executable, str(HERE / "train.py")]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    two += [str(HERE / "train.py")]
    flags = ["--only", "evaluate", "--eval_samples", "18", "--device", "cpu", "--out", str(finished)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for command in (alone, two):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240, env=one_thread)
        assert done.returncode == 0, done.stderr[-2000:]
        figures = re.findall(r"^evaluate (\S+) (\S+)$", done.stdout, re.M)
        found.append({name: float(value) for name, value in figures})
    found[0].pop("seconds"), found[1].pop("seconds")
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert "distances/fad_codec/generated" in found[0] and "distances/kl_root/floor" in found[0]


@pytest.mark.parametrize("flags, says", [
    (["--only", "valid"], "of which run"),
    (["--only", "valid", "--out", "nowhere"], "no best.pt"),
])
def test_a_stage_of_no_run(flags, says, capsys):
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# the page


def test_the_chart_of_distances(finished):
    """Training and ceiling beside what was generated; in the log of an older run there is no training."""
    records = page.read_log(finished / "log.jsonl")
    def labels():
        return [curve.label for curve in page.charts(records, [])["Frechet distance to validation clips"]]
    assert labels() == [f"{name}{bound}" for name in ("fad_codec", "fad_mel")
                        for bound in ("", ", training", ", ceiling")]
    for record in records:
        for row in record.get("distances", {}).values():
            row.pop("training", None)
    assert labels() == [f"{name}{bound}" for name in ("fad_codec", "fad_mel") for bound in ("", ", ceiling")]


def test_text_on_the_page_is_escaped(evil):
    content = page.write_page(evil).read_text()
    assert EVIL not in content and "<script" not in content and content.count("&lt;script&gt;") >= 4
    assert "<h1>a&amp;b</h1>" in content


def test_the_page_holds_everything(finished):
    content = (finished / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', content)
    assert sources and all(s.startswith("data:") for s in sources) and "url(" not in content
    assert content.count("<audio") == 2 * 2 + 2 * 3 * 2  # reference and codec, then each kind in two epochs
    assert len(content) < 3_000_000 and not list(finished.glob("*.tmp"))


def test_the_reference_curve_is_that_of_the_same_flags(tmp_path):
    header, *rest = (reference.ASSETS / "reference_run.jsonl").read_text().splitlines()
    args = flags.build_parser().parse_args([])
    flags.fill_flags(args, 1)
    args = vars(args) | json.loads(header)["args"]
    assert len(reference.reference_curve(dict(args=args))) == len(rest)
    others = dict(channels=2), dict(num_codebooks=3), dict(conditions=["text", "style"]), dict(no_text=True)
    for other in (*others, dict(size="base")):
        assert reference.reference_curve(dict(args=args | other)) == []
    assert reference.reference_curve({}) == [] == reference.reference_curve(dict(args="damaged"))


def test_a_flag_that_is_younger_than_a_run(tmp_path):
    """It counts as what runs had without it, on both sides; a flag that changes no number is not among
    them."""
    (tmp_path / "reference_one.jsonl").write_text(
        '{"kind": "header", "args": {"lr": 1, "late": 3}}\n'
        '{"kind": "stage", "stage": "valid", "step": 1}\n')
    without = dict(young=0, late=2)
    like = dict(lr=1, late=3, out="anywhere")
    for args in (like, like | dict(young=0)):
        assert len(reference.reference_curve(dict(args=args), tmp_path, without)) == 1
    for args in (like | dict(young=1), dict(lr=1), dict(lr=1, late=2), dict(late=3), like | dict(lr=2)):
        assert reference.reference_curve(dict(args=args), tmp_path, without) == []


def test_real_music_is_compared_where_shape_and_files_are_the_same(tmp_path):
    header = {"kind": "header", "args": {"lr": 1}, "model": {"K": 4}, "files": "f"}
    (tmp_path / "reference_music.jsonl").write_text(
        json.dumps(header) + '\n{"kind": "stage", "stage": "valid", "step": 1}\n')
    like = dict(args={"lr": 1, "dataset": "anywhere"}, model={"K": 4, "dim": 8}, files="f", torch="2")
    assert len(reference.reference_curve(like, tmp_path, {})) == 1
    header["codec"] = "c"
    (tmp_path / "reference_music.jsonl").write_text(
        json.dumps(header) + '\n{"kind": "stage", "stage": "valid", "step": 1}\n')
    same = dict(fingerprint="c")
    for codec, other in ((same, False), (dict(fingerprint="d"), True), (None, True), ("damaged", True)):
        assert reference.reference_curve(like | dict(codec=codec), tmp_path, {})[0]["other_codec"] is other
    others = dict(files="g"), dict(files=None), dict(model={"K": 5}), dict(model=None), dict(args={"lr": 2})
    for other in others:
        assert reference.reference_curve(like | other, tmp_path, {}) == []


def test_epochs_that_are_shown():
    names = [f"epoch_{i:04d}" for i in range(1, 41)]
    shown = page.shown_epochs([*names, "reference"])
    assert len(shown) == 6 and shown[0] == names[0] and shown[-1] == names[-1]
    assert page.shown_epochs(["reference", "best"]) == ["best"]


def test_damaged_folders(finished, tmp_path, capsys):
    """A cut log and a missing json are no reason to have no page; a folder that is no run is one line."""
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text()[:-40])
    (out / "samples" / "epoch_0001" / "000_prompted.json").write_text("{")
    assert page.main([str(out)]) == 0
    assert page.main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def replace(name: str, content: bytes | None = None):
    """Puts other bytes, or an empty folder, in the place of a file."""
    def change(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        if content is None:
            (out / name).mkdir()
        else:
            (out / name).write_bytes(content)
    return change


def link(name: str, target: str):
    """Puts a link in the place of a file."""
    def change(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)
    return change


def pipe(name: str):
    """Puts a pipe, into which nobody writes, in the place of a file."""
    def change(out: Path) -> None:
        (out / name).unlink()
        os.mkfifo(out / name)
    return change


def log_line(line: bytes):
    """Adds a line to the log."""
    def change(out: Path) -> None:
        (out / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes() + line + b"\n")
    return change


def log_field(**fields):
    """Changes fields of each record of validation and evaluation; None takes one away."""
    def change(out: Path) -> None:
        rows = []
        for row in lines(out):
            if row["stage"] in ("valid", "evaluate"):
                row = {k: v for k, v in (row | fields).items() if v is not None}
            rows.append(json.dumps(row) + "\n")
        (out / "log.jsonl").write_text("".join(rows))
    return change


WAV, CAPTION = "samples/epoch_0001/000_prompted.wav", "samples/epoch_0001/000_prompted.json"
ODD = {    # what is done to the folder, and the file that the only line names; None: there is nothing to say
    "an empty file": (replace(WAV, b""), WAV),
    "no samples": (replace(WAV, bad_material.audio()[:44]), WAV),
    "a header alone": (replace(WAV, b"RIFF"), WAV),
    "text for sound": (replace(WAV, b"no audio"), WAV),
    "a picture for sound": (replace(WAV, b"\x89PNG\r\n\x1a\n" + bytes(range(256))), WAV),
    "sound that is not finite": (replace(WAV, bad_material.audio(np.nan, subtype="FLOAT")), WAV),
    "a folder for sound": (replace(WAV), WAV),
    "a link to nothing": (link(WAV, "nowhere.wav"), WAV),
    "a link to itself": (link(WAV, "000_prompted.wav"), WAV),
    "a folder that is a link to itself": (link("samples/loop", "loop"), None),
    "a pipe for sound": (pipe(WAV), WAV),
    "a cut caption": (replace(CAPTION, b'{"prompt": "a sl'), CAPTION),
    "a list of captions": (replace(CAPTION, b"[1]"), CAPTION),
    "nested captions": (replace(CAPTION, b"[" * 100_000), CAPTION),
    "a folder for a caption": (replace(CAPTION), CAPTION),
    "a pipe for a caption": (pipe(CAPTION), CAPTION),
    "words for the mark": (replace(CAPTION, b'{"prompt_seconds": "a quarter"}'), None),
    "a mark that is nowhere": (replace(CAPTION, b'{"prompt_seconds": NaN}'), WAV),
    "a caption that cannot be written": (replace(CAPTION, b'{"prompt": "\\ud800 organ"}'), None),
    "settings that are a list": (replace("config.json", b'{"args": [], "codec": "toy"}'), None),
    "cut settings": (replace("config.json", b'{"args": '), "config.json"),
    "no log": (replace("log.jsonl", b""), None),
    "a log of bytes": (replace("log.jsonl", bytes(range(256)) * 9), "log.jsonl"),
    "a folder for a log": (replace("log.jsonl"), "log.jsonl"),
    "a pipe for a log": (pipe("log.jsonl"), "log.jsonl"),
    "a cut line": (log_line(b'{"kind": "sta'), "log.jsonl"),
    "a number for a line": (log_line(b"3"), "log.jsonl"),
    "a nested line": (log_line(b"[" * 100_000), "log.jsonl"),
    "a line without step": (log_line(b'{"kind": "stage", "stage": "valid", "epoch": 1}'), "log.jsonl"),
    "a step in words": (log_field(step="three"), "log.jsonl"),
    "a step too far": (log_field(step=10 ** 400), "log.jsonl"),
    "no loss": (log_field(ce=None), None),
    "a loss in words": (log_field(ce="low", ce_q1="low"), None),
    "a loss not finite": (log_field(ce=float("nan"), ce_q1=float("-inf"), ce_q2=10 ** 400), None),
    "codebooks by other names": (log_field(ce_qa=3.0, ce_q=1.0), None),
    "figures that are none": (log_field(distances="far", adherence=[1]), None),
    "figures in other places": (log_field(distances=3.0, adherence={"valid": 1.0}), None),
    "figures that are not in rows": (log_field(distances={"fad_mel": 2.0}), "index.html"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_shown_is_left_out(name, finished, tmp_path, monkeypatch, capsys):
    """The rest of the page is there, and one line names the file."""
    change, named = ODD[name]
    others = shutil.ignore_patterns("*.pt", "epoch_0002", "reference", "001_*")
    out = shutil.copytree(finished, tmp_path / "run", ignore=others)
    change(out)
    if named in (WAV, CAPTION):
        monkeypatch.setattr(page, "chart_png", lambda *rest: b"")
    common.say_once.cache_clear()
    assert page.main([str(out)]) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "pip install" not in line]
    assert len(errors) == (named is not None), errors
    assert named is None or str(out / named) in errors[0] and " is left out: " in errors[0]
    assert (out / "index.html").read_text().count("<audio") == (2 if named == WAV else 3)


def test_drawing_never_ends_a_run(tmp_path, monkeypatch, capsys):
    """Odd files among its samples, pictures that fail, and a page that fails as a whole."""
    wav, draw, drawn = tmp_path / "run" / "samples" / "epoch_0001" / "000_prompted.wav", page.page_html, []

    def page_html(out: Path) -> str:
        drawn.append(wav.write_bytes(b""))
        if len(drawn) == 3:
            raise MemoryError("no room for a page")
        return draw(out)

    monkeypatch.setattr(page, "page_html", page_html)
    monkeypatch.setattr(page, "chart_png", lambda *rest: 1 / 0)
    monkeypatch.setattr(stages, "evaluate_stage", lambda run: {})
    monkeypatch.setattr(stages, "draw_page", lambda run, final, due=stages.draw_page: due(run, True))
    common.say_once.cache_clear()
    flags = ["--epochs", "3", "--generate_every", "1", "--generate_samples", "1"]
    assert train.main([*SMALL, *flags, "--out", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert len(drawn) == 3 and error.count(f"{wav} is left out") == 1
    assert "index.html is left out: out of memory" in error
    assert not page.can_draw() or "the chart of the learning rate is left out: ZeroDivisionError" in error


@pytest.mark.parametrize("rate", (16_000, 44_100, 15_000))
def test_audio_within_the_page(rate, tmp_path):
    import base64
    wav = 0.5 * torch.sin(torch.arange(rate) * 0.05)[None]
    kind, content = page.audio_uri(wav, rate).split(";base64,")
    (tmp_path / "x").write_bytes(base64.b64decode(content))
    assert soundfile.info(tmp_path / "x").duration == pytest.approx(1, abs=0.1)
    assert kind.startswith("data:audio/")


def dumped(path, *flags) -> str:
    """The page as the browser has it after its scripts and sounds were loaded."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               "--virtual-time-budget=20000", f"--user-data-dir={path.parent / 'profile'}", *flags,
               "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


MEASURE = """<script>
const players = [...document.querySelectorAll("audio")];
const report = () => {
  document.body.dataset.done = JSON.stringify(players.map(a => [a.duration, a.error && a.error.message]));
};
Promise.all(players.map(a => new Promise(done => {
  if (a.readyState >= 1) done(); a.onloadedmetadata = done; a.onerror = done; a.load(); }))).then(report);
const shown = [...document.images].filter(i => i.complete && i.naturalWidth > 0);
document.body.dataset.pictures = shown.length + "/" + document.images.length;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_the_page_in_a_browser(evil):
    """Every player has a sound with a duration, every picture shows, and a caption that is a script does
    nothing."""
    content = page.write_page(evil).read_text()
    dom = dumped(evil / "index.html")
    assert "<title>a&amp;b</title>" in dom and "&lt;script&gt;" in dom
    # without its policy, with the measuring script: nor does escaped text run where scripts may
    free = content.replace(f'content="{page.POLICY}"', "").replace("</body>", MEASURE + "</body>")
    (evil / "measured.html").write_text(free)
    dom = dumped(evil / "measured.html", "--autoplay-policy=no-user-gesture-required")
    assert "<title>a&amp;b</title>" in dom
    durations = json.loads(re.search(r'data-done="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert len(durations) == 16, durations
    assert all(error is None and d == pytest.approx(1.6, abs=0.15) for d, error in durations), durations
    shown, total = re.search(r'data-pictures="(\d+)/(\d+)"', dom).groups()
    assert shown == total and (page.can_draw() is False or int(total) >= 16)
    # where the escaping is taken away, the policy alone stops the script; without both it runs, which shows
    # that this test would see it
    unescaped = content.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    neither = unescaped.replace(page.POLICY, "")
    for name, text, title in (("policy", unescaped, "a&amp;b"), ("neither", neither, "evil")):
        (evil / f"{name}.html").write_text(text)
        assert f"<title>{title}</title>" in dumped(evil / f"{name}.html")


# ------------------------------------------------------------------------------------------------------------
# TensorBoard


def test_tensorboard_has_the_names_of_the_log(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert train.main([*SMALL, "--epochs", "1", "--tensorboard", "--out", str(tmp_path / "run")]) == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = board.Tags()
    for record in lines(tmp_path / "run"):
        for name, value in common.flatten_numbers(record).items():
            if name not in ("epoch", "step"):
                scalars = board.Scalars(f"{record['kind']}/{record['stage']}/{name}")
                events = {e.step: e.value for e in scalars}
                assert events[record["step"]] == pytest.approx(value, rel=1e-5, nan_ok=True)
    assert {"000_unprompted", "001_prompted", "000_reference"} <= set(tags["audio"]) & set(tags["images"])


def test_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert train.main([*SMALL, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err


def test_without_matplotlib(finished, monkeypatch, capsys):
    """The page is there, without pictures, and says so."""
    page.can_draw.cache_clear()
    page.player_html.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    try:
        content = page.page_html(finished)
        assert "<audio" in content and "<img" not in content
        assert "pip install matplotlib" in capsys.readouterr().err
    finally:
        page.can_draw.cache_clear()
        page.player_html.cache_clear()
