"""The page of generate.py --serve: what is behind its buttons; with gradio, the page itself."""

import json
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import faults
import conditioning
import generate
from support import audio, serve, takes
import tokenizer
import toy
from conditioning import Conditioner, ConditionerConfig
from generate import Sampling
from model import ModelConfig, MusicGen

CODEC = tokenizer.load_codec("toy")
PIECES = conditioning.fit_sentencepiece(["slow organ", "fast bells", "a calm harp"] * 9, 60)
SHAPE = dict(
    text_vocab=conditioning.vocabulary_size(PIECES), text_dim=16, text_hidden=32, melody_frames=13,
    style_card=256, style_dim=32, style_layers=1, style_heads=2, style_bins=8, style_frames=50)
SAMPLING = Sampling(cfg=2.0, temperature=1.0, top_k=50)


def tiny(*names: str, **shape) -> generate.MusicGenerator:
    """Random weights that take these conditions; a window of 0.8 s. shape: fields of ModelConfig."""
    torch.manual_seed(1)
    config = ModelConfig(**dict(K=4, card=256, dim=32, num_layers=2, num_heads=2) | shape)
    fuse = {name: "cross" if name == "text" else "prepend" for name in names}
    conditioner = Conditioner(ConditionerConfig(fuse=fuse, **SHAPE), 32, {"text": PIECES}) if names else None
    return generate.MusicGenerator(MusicGen(config, conditioner).eval(), CODEC, 40, SAMPLING)


@pytest.fixture()
def tune(tmp_path) -> str:
    """A file with a second of a tone."""
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)[None]
    audio.write_audio(tmp_path / "tune.wav", tone, 16_000)
    return str(tmp_path / "tune.wav")


def test_fields_are_what_the_model_knows():
    assert list(takes.page_fields(tiny())) == ["seconds", "cfg", "temperature", "top_k", "top_p", "seed"]
    with_text = takes.page_fields(tiny("text"))
    assert list(with_text)[:2] == ["text", "seconds"] and "cfg_style" not in with_text
    every = takes.page_fields(tiny("melody", "style", "text"))
    assert list(every)[:4] == ["text", "melody", "style", "seconds"] and "cfg_style" in every
    assert (every["seconds"], every["cfg"], every["top_k"]) == (0.8, 2.0, 50)


def test_the_button_makes_what_generate_makes(tune):
    music, wav, steps = tiny("text", "melody", "style"), audio.read_audio(tune), []
    asked = takes.page_fields(music) | dict(text=" slow\norgan", seed=3, top_k=7, cfg_style=3)
    sampling = Sampling(cfg=2.0, top_k=7, cfg_style=3)
    for names in ((), ("melody",), ("melody", "style")):
        more, given = dict.fromkeys(names, tune), dict.fromkeys(names, wav)
        found = takes.perform(music, asked | more, lambda *step: steps.append(step))
        assert torch.equal(found, music.generate(["slow organ"], 0.8, 3, sampling, **given)[0])
    assert steps[-1] == (40, 40)
    without_text = music.generate([None], 0.8, 3, sampling)[0]
    assert torch.equal(takes.perform(music, asked | dict(text="")), without_text)
    assert not torch.equal(takes.perform(music, asked), takes.perform(music, asked | dict(seed=4)))


@pytest.mark.parametrize("wrong, says", [
    (dict(seconds=0), "seconds 0"),
    (dict(seconds=301), "at most 300"),
    (dict(seconds=None), "seconds is empty"),
    (dict(seconds=float("nan")), "seconds nan"),
    (dict(top_k=2.5), "whole number"),
    (dict(seed=-1), "seed -1"),
    (dict(cfg="1"), "cfg 1"),
    (dict(temperature=-1), "temperature -1"),
    (dict(top_p=2), "top_p 2"),
    (dict(melody="README.md"), "melody: README.md: not readable"),
    (dict(style="nowhere/a.wav"), "style: a.wav: no such file"),
    (dict(melody="{silence}"), "melody: silence.wav: it is silent"),
])
def test_bad_fields_are_one_line(wrong, says, tmp_path):
    audio.write_audio(tmp_path / "silence.wav", torch.zeros(1, 16_000), 16_000)
    if wrong.get("melody") == "{silence}":
        wrong = dict(melody=str(tmp_path / "silence.wav"))
    music = tiny("text", "melody", "style")
    with pytest.raises(ValueError) as error:
        takes.perform(music, takes.page_fields(music) | dict(text="slow organ") | wrong)
    assert says in str(error.value) and "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_without_gradio_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert generate.main(["--run", "nowhere", "--serve"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "gradio>=6"' in error and error.count("\n") == 1


@pytest.mark.parametrize("flags, says", [
    (["--prompt", "slow organ"], "--prompt does not go with --serve"),
    (["--continue", "a.wav"], "--continue does not go"),
    (["--seconds", "400"], "at most 300"),
    (["--stride", "1"], "--stride does not go"),
    (["--cfg", "1000"], "cfg 1000"),
    (["--seconds", "0"], "--seconds 0"),
])
def test_flags_that_the_page_has_no_use_for(flags, says, monkeypatch, capsys):
    monkeypatch.setattr(serve, "import_gradio", lambda: None)
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: tiny("text"))
    assert generate.main(["--run", "nowhere", "--serve", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_page_begins_with_the_settings_of_the_command_line(monkeypatch):
    served = []
    monkeypatch.setattr(serve, "import_gradio", lambda: None)
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: tiny("text"))

    def show(gradio, music, args):
        served.append(takes.page_fields(music, args.seconds, args.seed))

    monkeypatch.setattr(serve, "serve", show)
    assert generate.main("--run nowhere --serve --cfg 4 --top_k 0 --seconds 2.5 --seed 7".split()) == 0
    assert served == [takes.page_fields(tiny("text")) | dict(cfg=4.0, top_k=0, seconds=2.5, seed=7)]


def flags(*more: str):
    """The command line that opens a page."""
    return generate.build_generate_parser().parse_args(["--run", "nowhere", "--serve", *more])


def build(music, folder):
    """The page of a model, and what its first button does."""
    page = serve.build_page(serve.import_gradio(), music, flags(), str(folder))
    return page, next(each.fn for each in page.fns.values() if each.api_name == "generate")


def clip_of(outputs) -> str:
    """The wav among what the page returns, beside its json; others come before them."""
    return outputs[-1][0]


@pytest.mark.parametrize("ffmpeg", ["/usr/bin/ffmpeg", None])
def test_the_page_plays_while_it_generates(ffmpeg, tmp_path, monkeypatch):
    """The pieces, each a wav, are the clip that follows; without ffmpeg, which gradio needs for them, it
    comes alone."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.setattr(serve.shutil, "which", lambda name: ffmpeg)
    music = tiny("text")
    act = build(music, tmp_path)[1]
    fields = takes.page_fields(music) | dict(text="slow organ", seconds=1.9)
    *pieces, last = act(*fields.values(), "", 1, [])
    whole = audio.read_audio(clip_of(last))
    assert whole.shape == (1, 30_400) and len(last) == (4 if ffmpeg else 3)
    for i, (content, *_) in enumerate(pieces):
        (tmp_path / f"{i}.wav").write_bytes(content)
    heard = [audio.read_audio(tmp_path / f"{i}.wav") for i in range(len(pieces))]
    assert len(heard) == (4 if ffmpeg else 0)
    if ffmpeg:
        assert torch.cat(heard, 1).shape == whole.shape
        assert (torch.cat(heard, 1) - whole).abs().max() <= 1 / audio.FULL_SCALE


def test_the_page_through_a_client(tune, tmp_path, monkeypatch):
    """What the page returns is the file that the command line writes; what it refuses comes as a message."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio_client import Client, handle_file
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    music = tiny("text", "melody")
    page, _ = build(music, tmp_path)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    try:
        client = Client(address, verbose=False, download_files=tmp_path / "client")
        asked = takes.page_fields(music) | dict(text="slow organ", seed=3, melody=handle_file(tune))
        found = clip_of(client.predict(*asked.values(), api_name="/generate"))
        expected = music.generate(["slow organ"], 0.8, 3, melody=audio.read_audio(tune))[0]
        audio.write_audio(tmp_path / "expected.wav", expected, CODEC.sample_rate)
        assert open(found, "rb").read() == (tmp_path / "expected.wav").read_bytes()
        with pytest.raises(Exception, match="top_k 2.5: give a whole number"):
            client.predict(*(asked | dict(top_k=2.5)).values(), api_name="/generate")
    finally:
        page.close()
    assert address.startswith("http://127.0.0.1:")


def test_requests_at_the_same_time_get_their_own_music(tmp_path, monkeypatch):
    """Six at once, through the queue; what would go past it is refused; wavs and jsons are forgotten."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from gradio.route_utils import delete_files_created_by_app
    from gradio_client import Client
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    music = tiny("text")
    page, _ = build(music, tmp_path)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    asked = [takes.page_fields(music) | dict(text="slow organ", seed=seed) for seed in range(6)]
    try:
        client = Client(address, verbose=False, download_files=tmp_path / "client")
        jobs = [client.submit(*fields.values(), api_name="/generate") for fields in asked]
        found = [audio.read_audio(clip_of(job.result())) for job in jobs]
        past_the_queue = urllib.request.Request(
            f"{address}gradio_api/run/generate", json.dumps(dict(data=list(asked[0].values()))).encode(),
            {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(past_the_queue)
        assert len(list(tmp_path.glob("tmp*/seed*"))) == 12
        delete_files_created_by_app(page, 0)                               # what gradio does every hour
        assert not list(tmp_path.glob("tmp*/seed*"))
    finally:
        page.close()
    for seed, wav in enumerate(found):
        assert torch.allclose(wav, music.generate(["slow organ"], 0.8, seed)[0].clamp(-1, 1), atol=1e-4), seed


def test_no_result_takes_the_file_of_another(tmp_path):
    """Also where a page would run two at once: the music of one is there when the next is done."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    music = tiny("text")
    act = build(music, tmp_path)[1]
    fields = takes.page_fields(music) | dict(text="slow organ")
    first, second = (clip_of(list(act(*(fields | dict(seed=seed)).values(), "", 1, []))[-1])
                     for seed in (0, 1))
    assert first != second and Path(first).read_bytes() != Path(second).read_bytes()
    assert {tmp_path} == {Path(name).parent.parent for name in (first, second)}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_page_ends_with_its_files(number, code, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: tiny("text"))
    seen = []

    def wait(page):
        seen.extend(tmp_path.iterdir())
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(serve.import_gradio().Blocks, "block_thread", wait)
    assert generate.main(["--run", "nowhere", "--serve", "--port", str(faults.free_port())]) == code
    assert len(seen) == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"generate.py: stopped by {number.name}\n"


# ------------------------------------------------------------------------------------------------------------
# takes


def made(music, folder, plan, before=None, **more) -> list:
    """The takes of a plan."""
    return [takes.make_take(music, flags(), str(folder), *one, before, **more) for one in plan]


def command_line(music, monkeypatch, tmp_path, *more: str) -> list:
    """[(wav, json)] that generate.py writes with these flags."""
    monkeypatch.setattr(generate.MusicGenerator, "load", lambda *_, **__: music)
    out = tmp_path / "command"
    assert generate.main(["--run", "nowhere", "--out", str(out), *more]) == 0
    return [(path.read_bytes(), json.loads(path.with_suffix(".json").read_text()))
            for path in sorted(out.glob("*.wav"))]


def files_of(take) -> tuple:
    return take.path.read_bytes(), json.loads(take.path.with_suffix(".json").read_text())


def test_several_takes_are_the_files_of_n(tmp_path, monkeypatch):
    """Wav and json, those of --n 3."""
    music = tiny("text")
    asked = takes.page_fields(music) | dict(text=" slow\norgan", seed=5, top_k=7)
    found = made(music, tmp_path, takes.plan_takes(asked, None, 3))
    expected = command_line(music, monkeypatch, tmp_path, "--prompt", "slow organ", "--n", "3", "--seed", "5",
                            "--top_k", "7")
    assert [files_of(take) for take in found] == expected and len({wav for wav, _ in expected}) == 3


def test_going_on_is_continue(tmp_path, monkeypatch):
    """By its length again, with its own prompt, seed and number."""
    music = tiny("text")
    asked = takes.page_fields(music) | dict(text="slow organ", seed=5)
    take = made(music, tmp_path, takes.plan_takes(asked, None, 2))[1]
    further, = made(music, tmp_path, takes.plan_to_go_on(take), take)
    (wav, record), = command_line(music, monkeypatch, tmp_path, "--prompt", "slow organ", "--seed", "5",
                                  "--first", "1", "--continue", str(take.path), "--seconds", "1.6")
    assert files_of(further) == (wav, record | dict(continued=take.path.name))
    assert audio.read_audio(further.path).shape == (1, 2 * 12_800)
    take.path.unlink()
    with pytest.raises(ValueError, match="seed5_001.wav: forgotten"):
        takes.plan_to_go_on(take)
    further.asked["seconds"] = 151
    with pytest.raises(ValueError, match="302 s: a clip has at most 300"):
        takes.plan_to_go_on(further)


def test_two_prompts_share_seed_and_numbers():
    """So a pair differs in its prompt alone."""
    asked = takes.page_fields(tiny("text")) | dict(text="slow organ", seed=5)
    plan = takes.plan_takes(asked, "fast bells", 2)
    assert [(fields["text"], fields["seed"], number) for fields, number in plan] == [
        ("slow organ", 5, 0), ("slow organ", 5, 1), ("fast bells", 5, 0), ("fast bells", 5, 1)]
    assert takes.plan_takes(asked, " \n") == [(asked, 0)]
    for count in (0, 5, 1.5, None):
        with pytest.raises(ValueError, match=f"takes {count}: 1 to 4"):
            takes.plan_takes(asked, None, count)


def test_a_take_shows_what_it_is(tmp_path, tune):
    """Its prompt as text whatever it holds, picture, player, files; a file without the folder it came to."""
    music = tiny("text", "melody")
    asked = takes.page_fields(music) | dict(text='<b onclick="x()">organ', melody=tune, seed=7)
    take, = made(music, tmp_path, [(asked, 2)])
    assert "<b " not in take.html and "&lt;b onclick=&quot;x()&quot;&gt;organ, melody tune.wav" in take.html
    assert "seed 7, number 2" in take.html and "<table" not in take.html and "data:image/png" in take.html
    paths = [take.path, take.path, take.path.with_suffix(".json")]
    assert re.findall(r'(?:src|href)="gradio_api/file=([^"]+)"', take.html) == [str(path) for path in paths]
    assert take.record["melody"] == "tune.wav"


def test_examples_are_the_captions_of_the_run(tmp_path):
    def run(name: str, dataset: str, *prompts) -> str:
        samples = tmp_path / name / "samples" / "epoch_0001"
        samples.mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(dict(args=dict(dataset=dataset))))
        for i, prompt in enumerate(prompts):
            (samples / f"{i:03}_unprompted.wav").touch()
            (samples / f"{i:03}_unprompted.json").write_text(json.dumps(dict(prompt=prompt)))
        return str(tmp_path / name)

    assert takes.example_captions(run("music", "/music", "a waltz", None, "a waltz", "a reel")) == [
        "a waltz", "a reel"]
    assert takes.example_captions(run("none", "/music")) == [] == takes.example_captions("nowhere")
    learnt = run("learnt", "toy", "a waltz")
    assert takes.is_toy_run(learnt) and not takes.is_toy_run("nowhere")
    assert takes.example_captions(learnt)[0] == toy.draw_clip(0, 0, 0, "valid")[1]


def test_what_the_analyser_hears_stands_beside_what_was_asked(tmp_path):
    """Of every wording of toy captions; what a text leaves open counts neither way."""
    for i in range(300):
        clip, text = toy.draw_clip(0, 0, i)
        assert takes.asked_attributes(text) == clip.attributes(), text
    assert takes.asked_attributes("a calm organ or a flute") == dict(tempo="slow")
    clip = toy.make_clip(1, 0, 0, "valid")
    shown = takes.heard_html(torch.from_numpy(clip.wav)[None], toy.SAMPLE_RATE, clip.text)
    assert shown.count("✓") == 5 and "✗" not in shown
    tempo = next(value for value in toy.VALUES["tempo"] if value != clip.clip.tempo)
    shown = takes.heard_html(torch.from_numpy(clip.wav)[None], toy.SAMPLE_RATE, f"a {tempo} tune")
    assert shown.count("✗") == 1 and "✓" not in shown
    music = tiny("text")
    take, = made(music, tmp_path, [(takes.page_fields(music), 0)], is_toy=True)
    assert "what the analyser hears" in take.html


def test_a_row_of_takes_keeps_its_place(tmp_path):
    """gradio writes over a place whose content is another, and what plays there would stop."""
    music = tiny("text")
    asked = takes.page_fields(music) | dict(text="slow organ")
    rows = [made(music, tmp_path, [(asked | dict(seed=seed), 0)]) for seed in (1, 2)]
    visits = [], rows[1:], rows, [rows[0] * 2, rows[1]]
    shown = [takes.visit_html(visit).split("</section>") for visit in visits]
    assert len({len(places) for places in shown}) == 1
    assert shown[1][-2] == shown[2][-2] == shown[3][-2] and "seed 2" in shown[2][-2]
    assert shown[3][-3].startswith(shown[2][-3]) and "seed 1" in shown[2][-3]     # and within a row
    assert {*shown[2][:-3]} == {'<section class="row">'}
    rows[1][0].path.unlink()
    assert "seed2_000.wav: forgotten" in takes.visit_html(rows)


def test_a_button_goes_on_from_its_take(tmp_path):
    """It gives the path of its take, of which the visit must hold one."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    page, act = build(tiny("text"), tmp_path)
    fields = takes.page_fields(tiny("text")) | dict(text="slow organ")
    visit = list(act(*fields.values(), "", 2, []))[-1][-2]
    go_on = next(each.fn for each in page.fns.values() if getattr(each.fn, "__name__", "") == "go_on")
    path = re.findall(r'<button type="button" value="([^"]+)"', takes.visit_html(visit))[1]
    rows = list(go_on(visit, SimpleNamespace(path=path)))[-1][-2]
    assert rows[1:] == visit and rows[0][0].record["continued"] == visit[0][1].path.name == Path(path).name
    assert rows[0][0].record["number"] == 1


def test_sliders_hold_the_first_values():
    """Where the command line goes beyond what they usually offer."""
    music = tiny("text", "melody")
    usual = serve.slider_ranges(music, takes.page_fields(music))
    assert usual["seconds"] == (0.1, 60, 0.1) and usual["top_k"] == (0, 256, 1) and "seed" not in usual
    wide = serve.slider_ranges(music, takes.page_fields(music, 200) | dict(cfg=-3, temperature=9))
    assert wide["seconds"][1] == 200 and wide["cfg"][:2] == (-3, 10) and wide["temperature"][1] == 9


def test_the_list_of_takes_grows(tmp_path):
    """The newest first, those of one request beside each other; the other buttons are no part of the API."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    page, act = build(tiny("text"), tmp_path)
    fields = takes.page_fields(tiny("text")) | dict(text="slow organ")
    before = list(act(*fields.values(), "", 1, []))[-1][-2]
    rows = list(act(*fields.values(), "fast bells", 2, before))[-1][-2]
    assert [[take.record["prompt"] for take in row] for row in rows] == [
        ["slow organ", "slow organ", "fast bells", "fast bells"], ["slow organ"]]
    assert [name for name in page.get_api_info()["named_endpoints"]] == ["/generate"]
