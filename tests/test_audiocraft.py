"""audiocraft's packages as ours and out again, and what is refused."""

import sys

import pytest
import torch

import generate
import tokenizer
from interop import convert, load
from interop.package import read_package
from interop.t5 import PUBLISHED_T5
from interop.tensors import PACKAGE_FILES
from foreign import CODEC_CFG, XP_CFG, needs_transformers, package_of, published, save, write

STYLE_CFG = """\
  self_wav:
    model: style
    style:
      model_name: mert
      transformer_scale: default
"""


def read_settings(folder, text: str):
    """The settings of a package whose xp.cfg is this text."""
    torch.save({"best_state": {}, "xp.cfg": text}, folder / "settings.bin")
    return read_package(folder / "settings.bin")[0]


def test_plain_yaml(tmp_path):
    pytest.importorskip("yaml")
    get = read_settings(tmp_path, CODEC_CFG).get
    assert get("seanet.ratios") == [8, 5, 4,
                                    2] and get("encodec.channels") == 1 and get("seanet.causal") is False
    assert get("seanet.activation_params") == {"alpha": 1.0} and get("rvq.bins") == 32 and get(
        "rvq.no.such") is None
    read = read_settings(tmp_path, XP_CFG.format(K=2, channels=1, delays="- 0\n    - 1")).content
    assert read["codebooks_pattern"]["delay"] == {"delays": [0, 1], "flatten_first": 0}
    assert read["fuser"]["cross"] == ["description"]
    assert read["transformer_lm"]["layer_scale"] is None and read["fuser"]["sum"] == [] and "note" in read


def test_odd_yaml(tmp_path):
    """Numbers that YAML 1.1 takes for text, references to references and in a circle, and what is not
    YAML."""
    pytest.importorskip("yaml")
    settings = read_settings(tmp_path, "a: 1e-5\nb: 2.E+3\nc: 1.\nd: ${e.f}\ne: {f: \"${a}\", g: '1e-5'}\nh: "
                                       "${h}\ni: ${e}")
    assert [settings.get(name) for name in "abcd"] == [1e-5, 2e3, 1.0, 1e-5]
    assert settings.get("e.g") == "1e-5" and settings.get("h") == "${h}" and settings.get("i")["g"] == "1e-5"
    for text in ("a: [", "a: !!python/object:os.system x", "{"):
        with pytest.raises(ValueError, match="xp.cfg is not"):
            read_settings(tmp_path, text)


def test_yaml_needs_a_package_that_the_error_names(tmp_path, monkeypatch):
    """Ours is JSON, which does not need it."""
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert read_settings(tmp_path, '{"a": 1e-05}').get("a") == 1e-5
    with pytest.raises(ValueError, match="pip install pyyaml"):
        read_settings(tmp_path, "a: 1")


@needs_transformers
@pytest.mark.parametrize("melody", [False, True], ids=["text", "melody"])
@pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
def test_package_in_and_out(channels, melody, tmp_path, capsys, monkeypatch):
    """The same tensors as from the Hugging Face folder, in and out again.

    Padded text is attended to, as audiocraft has it."""
    theirs = published(channels, melody=melody)
    folder, (package, t5) = save(theirs, tmp_path / "hf"), package_of(theirs, tmp_path / "package")
    wanted, found = load.read_published(folder), load.read_published(package, t5)
    frames = {"melody_frames": 235} if melody else {}
    assert found["conditioner_config"] == {**wanted["conditioner_config"], **frames}
    assert found["model"].keys() == wanted["model"].keys()
    assert all(torch.equal(x, found["model"][name]) for name, x in wanted["model"].items())
    assert found["codec"]["fingerprint"] == wanted["codec"]["fingerprint"]
    assert {**wanted["model_config"], "mask_padding": False} == found["model_config"]
    assert found["segment_frames"] == 1500 and found["sampling"]["cfg"] == 3.0
    assert generate.main(["--model", str(package), "--prompt", "x"]) == 2
    assert "--t5 T5_FOLDER --to nano" in capsys.readouterr().err
    write(package, "nano", tmp_path / "nano", capsys, "--t5", str(t5))
    command = ["--model", str(tmp_path / "nano"), "--prompt", "slow organ", "--seconds", "0.2"]
    assert generate.main([*command, "--out", str(tmp_path / "g")]) == 0
    capsys.readouterr()
    assert convert.main([str(tmp_path / "nano"), "--to", "audiocraft", "--out", str(tmp_path / "no")]) == 2
    assert "fetches by name" in capsys.readouterr().err
    monkeypatch.setitem(PUBLISHED_T5, (24, 2, 3, 8, 40, 360), "t5-tiny")
    assert ("demucs" in write(tmp_path / "nano", "audiocraft", tmp_path / "out", capsys)) == melody
    back = load.read_published(tmp_path / "out", t5)
    assert back["model_config"] == found["model_config"] and back["segment_frames"] == 1500
    for name in PACKAGE_FILES:
        (_, before), (_, after) = (read_package(f / name) for f in (package, tmp_path / "out"))
        assert before.shapes == after.shapes
        if name == "state_dict.bin":
            assert all(torch.equal(before[n], after[n]) for n in before.shapes)
    a, b = (tokenizer.load_codec(str(f)) for f in (package, tmp_path / "out"))
    wav = torch.randn(1, 1, 4000) * 0.3
    codes = a.encode(wav)
    assert torch.equal(codes, b.encode(wav))
    assert (a.decode(codes) - b.decode(codes)).abs().max() < 1e-5    # its weight norms are written anew


@needs_transformers
def test_wrong_packages(tmp_path, capsys):
    package, t5 = package_of(published(), tmp_path / "package")
    other, _ = package_of(published(melody=True), tmp_path / "melody")
    content, tuned = (torch.load(folder / "state_dict.bin") for folder in (package, other))

    def replace(package_content, old, new):
        assert old in package_content["xp.cfg"]
        changed = {**package_content, "xp.cfg": package_content["xp.cfg"].replace(old, new)}
        return lambda: torch.save(changed, package / "state_dict.bin")

    def store(new, name="state_dict.bin"):
        return lambda: torch.save(new, package / name)

    def point_to_a_codec():
        store(content)()
        store(dict(pretrained="facebook/encodec_32khz"), "compression_state_dict.bin")()

    cases = [
        (replace(tuned, "argmax: true", "argmax: false"), "chroma_stem.argmax is False, True was expected"),
        (replace(tuned, "radix2_exp: 13", "radix2_exp: 14"), "chroma_stem.radix2_exp is 14, 13 was expected"),
        (replace(tuned, "n_chroma: 12", "n_chroma: 24"), "chroma_stem.n_chroma is 24, 12 was expected"),
        (replace(tuned, "model: chroma_stem", "model: clap"),
         "conditioners.self_wav.model is clap, chroma_stem was expected"),
        (replace(tuned, "  - self_wav\n", ""), "prepend ['description']; cross ['description'], or prepend"),
        (replace(content, "modeling: delay", "modeling: parallel"),
         "codebooks_pattern.modeling is parallel, delay was expected"),
        (store({**content, "xp.cfg": "nothing"}), "lacks transformer_lm.n_q"),
        (store(dict(best_state={})), "best_state and xp.cfg as text were expected"),
        (store({**content, "best_state": {}}), "missing: "),
        (lambda: (package / "state_dict.bin").write_bytes(b"PK\3\4"), "not a file of plain tensors"),
        (point_to_a_codec, "only points to facebook/encodec_32khz"),
    ]
    for change, says in cases:
        change()
        assert convert.main([str(package), "--t5", str(t5)]) == 2, says
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (says, error)
    whole = save(published(), tmp_path / "hf")
    assert convert.main([str(package), "--t5", str(t5), "--codec", str(whole)]) == 0


@needs_transformers
def test_style_packages_are_refused_with_one_line(tmp_path, capsys):
    package, t5 = package_of(published(melody=True), tmp_path / "package")
    content = torch.load(package / "state_dict.bin")
    config = content["xp.cfg"]
    content["xp.cfg"] = config[:config.index("  self_wav:")] + STYLE_CFG + config[config.index("fuser:"):]
    torch.save(content, package / "state_dict.bin")
    assert convert.main([str(package), "--t5", str(t5)]) == 2
    error = capsys.readouterr().err
    assert "is a MusicGen-Style, which is not read" in error and error.count("\n") == 1
