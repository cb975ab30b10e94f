"""What `lmcache codec` measures and calibrates is right, on small random models."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save
from torch import Tensor

from lmcache_core.contracts.serde import Rope
from lmcache_core.errors import ConfigError, UnknownPluginError
from lmcache_core.plugins.manager import Plugins
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec_eval import capture, needle, references, scoring, sensitivity, texts
from lmcache_kernels.codec_eval.calibration import CalibrationOptions, basis_heads, calibrate
from lmcache_kernels.codec_eval.models import Model, load
from lmcache_kernels.codec_eval.progress import bars, silent
from lmcache_kernels.codec_eval.schemes import serde_scheme, takes_profile

KINDS = ("llama", "qwen2", "qwen3")
LAYERS, HEADS, SIZE = 3, 2, 16


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: load(str(save(kind, folder / kind))) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


@pytest.fixture
def llama(models: dict[str, Model]) -> Model:
    return models["llama"]


def ids(model: Model, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator)


# -- models ----------------------------------------------------------------------------------------


def test_a_cache_is_layers_x_planes_x_tokens_x_heads_x_size(model: Model) -> None:
    cache = model.prefill(ids(model, 20))
    assert cache.shape == (LAYERS, 2, 20, HEADS, SIZE)
    assert (cache.dtype, model.group.dtype.value) == (torch.bfloat16, "BF16")


def test_what_follows_a_cache_is_what_the_whole_text_says(model: Model) -> None:
    text = ids(model, 30)
    with torch.inference_mode():
        whole = torch.log_softmax(model.network(text[None]).logits[0].float(), -1)
    exact = replace(model, dtype=torch.float32)  # the whole text's cache isn't rounded
    found = exact.log_probabilities(exact.prefill(text[:20]), text[20:])
    assert torch.allclose(found, whole[20:], atol=1e-3)


def test_greedy_text_is_the_likeliest_token_again_and_again(llama: Model) -> None:
    text = ids(llama, 20)
    exact = replace(llama, dtype=torch.float32)
    written = exact.greedy(exact.prefill(text), text[:1], 6)
    so_far = torch.cat((text, text[:1]))
    for token in written:
        with torch.inference_mode():
            assert exact.network(so_far[None]).logits[0, -1].argmax() == token
        so_far = torch.cat((so_far, token[None]))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .*no folder with a config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "a future one"}')
    with pytest.raises(ConfigError, match="transformers can't load it"):
        load(str(tmp_path))


# -- calibration -----------------------------------------------------------------------------------


def test_projections_turned_are_the_caches_keys(model: Model) -> None:
    """Capture, the rotation's frequencies and the cache agree, for each kind of attention."""
    text = ids(model, 40)
    cache = replace(model, dtype=torch.float32).prefill(text)
    for layer, (q, k, v) in enumerate(capture._projected(model, text)):
        assert q.shape == (39, 4, SIZE)
        assert torch.allclose(sensitivity.turned(k, model, 1), cache[layer, 0, 1:], atol=1e-4)
        assert torch.allclose(v, cache[layer, 1, 1:], atol=1e-5)


def test_turning_back_undoes_turning(llama: Model) -> None:
    keys = torch.randn(50, HEADS, SIZE)
    back = sensitivity.turned(sensitivity.turned(keys, llama, 1), llama, -1)
    assert torch.allclose(back, keys, atol=1e-5)


def test_moments_are_means_over_all_texts_but_their_first_tokens(llama: Model) -> None:
    pieces = [ids(llama, 30, seed) for seed in (1, 2)]
    found = capture.moments(llama, pieces)
    seen = [list(capture._projected(llama, piece)) for piece in pieces]
    for layer in range(LAYERS):
        q, k, v = (torch.cat([one[layer][n] for one in seen]) for n in range(3))
        assert torch.allclose(found.key_means[layer], k.mean(0), atol=1e-5)
        assert torch.allclose(found.value_means[layer], v.mean(0), atol=1e-5)
        # Queries 0 and 1 see the first head of keys. A pair is j and j + 8.
        rms = q[:, :2, [3, 11]].square().mean().sqrt()
        assert torch.allclose(found.query_rms[layer, 0, [3, 11]], rms.expand(2), atol=1e-4)


@pytest.mark.parametrize("block", [1, 2])
def test_components_are_orthogonal_and_the_largest_come_first(llama: Model, block: int) -> None:
    pieces = [ids(llama, 200, seed) for seed in range(3)]
    found = capture.moments(llama, pieces)
    steps = sensitivity.query_steps(found)
    bases = capture.bases(llama, pieces, found, steps, block)
    assert len(bases.keys[0]) == len(bases.values[0]) == HEADS // block
    for basis in (*bases.keys[1], *bases.values[1]):
        assert torch.allclose(basis.T @ basis, torch.eye(block * SIZE), atol=1e-4)
    keys = torch.cat([list(capture._projected(llama, piece))[1][1] for piece in pieces])
    scaled = ((keys - found.key_means[1]) / steps[1])[:, :block].flatten(1)
    variances = (scaled @ bases.keys[1][0]).square().mean(0)
    assert (variances.diff() <= 1e-4 * variances[0]).all()


def even_moments() -> capture.Moments:
    ones = torch.ones(LAYERS, HEADS, SIZE)
    return capture.Moments(ones, 0 * ones, 0 * ones)


def test_where_errors_cost_the_same_steps_are_those_of_queries() -> None:
    found = even_moments()
    weighed = torch.full((LAYERS, 2, HEADS, SIZE), 0.01)
    steps = sensitivity.key_steps(found, weighed)
    assert torch.allclose(steps, sensitivity.query_steps(found))
    assert torch.allclose(sensitivity.gains(steps, found, weighed), torch.ones(LAYERS, 2))


def test_steps_and_gains_are_smaller_where_errors_cost_more() -> None:
    found = even_moments()
    weighed = torch.full((LAYERS, 2, HEADS, SIZE), 0.01)
    weighed[1, 0, 0] *= 16
    weighed[2, 1] *= 16
    steps = sensitivity.key_steps(found, weighed)
    least, most = steps[1, 0], steps[1, 1]
    assert torch.allclose(most / least, torch.tensor(4**sensitivity.CHANNELS_SHARE))
    assert torch.allclose(steps[[0, 2]], sensitivity.query_steps(found)[[0, 2]])
    gains = sensitivity.gains(steps, found, weighed)
    assert torch.allclose(gains[0, 1] / gains[2, 1], torch.tensor(4**sensitivity.LAYERS_SHARE))
    assert gains[1, 0] < gains[0, 0] == gains[2, 0]


def test_steps_and_gains_have_limits_and_still_a_mean_of_one() -> None:
    found = even_moments()
    generator = torch.Generator().manual_seed(1)
    weighed = torch.randn(LAYERS, 2, HEADS, SIZE, generator=generator).mul(20).exp()
    steps = sensitivity.key_steps(found, weighed)
    factors = steps / sensitivity.query_steps(found)
    for found_, most, dims in (
        (factors, sensitivity.MOST_FACTOR, (1, 2)),
        (sensitivity.gains(steps, found, weighed), sensitivity.MOST_GAIN, (0,)),
    ):
        assert found_.log().abs().max() <= math.log(most) + 1e-4
        assert found_.log().mean(dims).abs().max() < 0.05


def rounded(model: Model, found: capture.Moments, x: Tensor, layer: int, plane: int) -> Tensor:
    """Keys or values of ``layer`` in steps of 0.3, except for the first token's."""
    rest = x[1:]
    if plane == 0:
        straight, scale = sensitivity.turned(rest, model, -1), sensitivity.query_steps(found)[layer]
    else:
        straight, scale = rest, rest.square().mean(-1, keepdim=True).sqrt()
    near = (straight / scale / 0.3).round() * 0.3 * scale
    return torch.cat((x[:1], sensitivity.turned(near, model, 1) if plane == 0 else near))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_gradients_tell_what_rounding_each_layer_costs(models: dict[str, Model], kind: str) -> None:
    exact = replace(models[kind], dtype=torch.float32)
    pieces = [ids(exact, 220, seed) for seed in range(3)]
    found = capture.moments(exact, pieces)
    contexts = [scoring.prepare(exact, piece, 160, 0) for piece in pieces]
    weighed = sensitivity.weights(exact, contexts, found, silent)
    assert weighed.shape == (LAYERS, 2, HEADS, SIZE)
    assert torch.equal(weighed[:, 0, :, : SIZE // 2], weighed[:, 0, :, SIZE // 2 :])
    told = weighed.sum((2, 3)) * 0.3**2 / 12
    tried = torch.zeros_like(told)
    for context in contexts:
        for layer in range(LAYERS):
            for plane in range(2):
                cache = context.cache.clone()
                cache[layer, plane] = rounded(exact, found, cache[layer, plane], layer, plane)
                said = exact.log_probabilities(cache, context.following)
                tried[layer, plane] += scoring.divergence(context.expected, said) / 3
    assert (tried > 1e-5).all()
    assert ((told / tried).log().abs() < math.log(1.6)).all(), (told, tried)


@pytest.mark.parametrize("kind", ["t2", "t3", "t4"])
def test_calibration_makes_a_profile_of_the_model(model: Model, tmp_path: Path, kind: str) -> None:
    pieces = [ids(model, 200, seed) for seed in range(2)]
    made = calibrate(model, pieces, CalibrationOptions(kind=kind))  # type: ignore[arg-type]
    assert made.kind == kind.upper()
    assert (made.layers, made.heads, made.head_size) == (LAYERS, HEADS, SIZE)
    assert Profile.find(tmp_path, model.identity, model.group) is None
    path = made.save(tmp_path)
    assert Profile.find(tmp_path, model.identity, model.group) == Profile.load(path)
    again = calibrate(model, pieces, CalibrationOptions(kind=kind))  # type: ignore[arg-type]
    assert again.digest == made.digest


def test_a_model_whose_rotation_isnt_known_cant_be_calibrated(llama: Model) -> None:
    with pytest.raises(ConfigError, match="changes; calibration knows llama"):
        calibrate(replace(llama, rope=None), [ids(llama, 20)], CalibrationOptions())
    with pytest.raises(ConfigError, match="is a gpt2"):
        calibrate(replace(llama, kind="gpt2"), [ids(llama, 20)], CalibrationOptions())


@pytest.mark.parametrize(
    ("heads", "size", "ranks", "expected"),
    [(2, 64, 1, 2), (3, 64, 1, 3), (8, 128, 1, 4), (8, 128, 4, 2), (8, 128, 8, 1), (1, 1024, 1, 1)],
)
def test_bases_stay_within_a_rank_and_a_size(
    heads: int, size: int, ranks: int, expected: int
) -> None:
    assert basis_heads(heads, size, CalibrationOptions(ranks=ranks)) == expected


# -- texts -----------------------------------------------------------------------------------------


def test_calibration_and_evaluation_share_no_text(llama: Model) -> None:
    source = texts.Text("numbers", "\n".join(f"{n:05d}" for n in range(4000)))
    read = {
        half: {
            line
            for piece in texts.windows([source], half, 8, 600, llama.tokens)  # type: ignore[arg-type]
            for line in llama.tokenizer.decode(piece).splitlines()
            if len(line) == 5
        }
        for half in ("calibration", "evaluation")
    }
    assert all(len(lines) > 700 for lines in read.values())
    assert not read["calibration"] & read["evaluation"]


def test_windows_alternate_between_texts_and_dont_overlap(llama: Model) -> None:
    sources = [texts.Text(c, f"{c * 9}\n" * 1000) for c in "ab"]
    found = texts.windows(sources, "calibration", 4, 500, llama.tokens)
    assert [llama.tokenizer.decode(piece)[:3] for piece in found] == ["aaa", "bbb", "aaa", "bbb"]
    assert [len(piece) for piece in found] == [500] * 4


def test_texts_that_are_too_short_or_no_texts_are_refused(llama: Model, tmp_path: Path) -> None:
    short = texts.Text("short.txt", "a word\n" * 100)
    with pytest.raises(ConfigError, match=r"'short.txt' is too short: .* 2 x 300 tokens"):
        texts.windows([short], "evaluation", 2, 300, llama.tokens)
    with pytest.raises(ConfigError, match=r"--text .*nothing.txt"):
        texts.read([tmp_path / "nothing.txt"])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ConfigError, match="name a file of plain text"):
        texts.read([tmp_path / "binary"])


def test_without_files_the_standard_library_is_read() -> None:
    prose, code = texts.read([])
    assert len(prose.content) > 100_000
    assert len(code.content) > 1_000_000


# -- scoring ---------------------------------------------------------------------------------------


def test_the_true_cache_changes_nothing(llama: Model) -> None:
    contexts = [scoring.prepare(llama, ids(llama, 60, seed), 40, 8) for seed in range(2)]
    found = scoring.score(llama, contexts, [context.cache for context in contexts])
    assert (found.kl, found.top1, found.greedy_same, found.greedy_whole) == (0, 1, 8, 1)
    loss = [
        -context.expected[:-1].gather(1, context.following[1:, None]).mean() for context in contexts
    ]
    assert found.perplexity == pytest.approx(math.exp(sum(loss) / 2), rel=1e-5)


def test_another_cache_is_noticed(llama: Model) -> None:
    context = scoring.prepare(llama, ids(llama, 80), 60, 16)
    found = scoring.score(llama, [context], [context.cache * 0.5])
    assert found.kl > 0.01
    assert found.top1 < 1
    # The text that this cache gives parts from the true one where `greedy_same` says.
    written = llama.greedy(context.cache * 0.5, context.following[:1], 16)
    expected = context.continuation
    same = next((n for n in range(16) if written[n] != expected[n]), 16)
    assert found.greedy_same == same < 16
    assert found.greedy_whole == 0


def test_divergence_is_kullback_and_leiblers() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(scoring.divergence(p.log(), q.log())) == pytest.approx(expected)


class Oracle(Model):
    """Knows what comes next if the cache it is given is the one that it prefilled."""

    def log_probabilities(self, cache: Tensor, following: Tensor) -> Tensor:
        answers = torch.roll(following, -1)
        if cache.sum() == 0:
            answers = answers + 1
        answers[-1] = ord("x") if cache.sum() == 0 else _last_digits[tuple(following.tolist())]
        return torch.nn.functional.one_hot(answers % 256, 256).float()


_last_digits: dict[tuple[int, ...], int] = {}


def test_needles_are_found_with_the_true_cache_only(llama: Model) -> None:
    text = ids(llama, 900)
    haystack = needle.hide(llama, text, 7)
    assert haystack.cache.shape[2] == 900
    assert len(haystack.questions) == needle.NEEDLES
    for question, answer in haystack.questions:
        assert llama.tokenizer.decode(question).startswith("\n\nQuestion: What is the secret")
        assert llama.tokenizer.decode(answer).strip().isdecimal()
        _last_digits[tuple(torch.cat((question, answer[:-1])).tolist())] = int(answer[-1])
    oracle = Oracle(**vars(llama))
    assert needle.retrieved(oracle, [haystack], [haystack.cache]) == needle.NEEDLES
    assert needle.retrieved(oracle, [haystack], [haystack.cache * 0]) == 0


def test_needles_are_at_even_distances_in_the_text(llama: Model) -> None:
    seen: list[Tensor] = []

    class Recorder(Model):
        def prefill(self, text: Tensor) -> Tensor:
            seen.append(text)
            return torch.zeros(1)

    needle.hide(Recorder(**vars(llama)), llama.tokens("a" * 2000), 1)
    text = llama.tokenizer.decode(seen[0])
    assert len(text) == 2000
    places = [found.start() for found in re.finditer("\nThe secret number", text)]
    assert len(places) == needle.NEEDLES
    gaps = torch.tensor([0, *places, 2000]).diff()
    assert gaps.max() - gaps.min() < 80


# -- schemes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins()


def test_a_serde_is_measured_by_the_bytes_that_it_writes(llama: Model, plugins: Plugins) -> None:
    cache = llama.prefill(ids(llama, 300))  # a whole chunk and a part of one
    raw = serde_scheme("raw", llama, plugins).code(cache)
    assert torch.equal(raw.cache, cache)
    assert raw.bits == 16 * cache.numel()
    lossless = serde_scheme("lossless", llama, plugins).code(cache)
    assert torch.equal(lossless.cache, cache)
    assert 0 < lossless.bits < raw.bits
    lossy = serde_scheme("cachegen:step=0.3", llama, plugins).code(cache)
    assert 0 < lossy.bits < lossless.bits
    assert not torch.equal(lossy.cache, cache)
    error = (lossy.cache - cache).float().square().mean() / cache.float().square().mean()
    assert error < 0.05


def test_keys_are_turned_back_because_serdes_learn_the_rotation(
    llama: Model, plugins: Plugins
) -> None:
    cache = llama.prefill(ids(llama, 256))
    blind = replace(llama, rope=None)
    knowing, unknowing = (serde_scheme("cachegen", m, plugins).code(cache) for m in (llama, blind))
    assert knowing.bits != unknowing.bits
    wrong = replace(llama, rope=Rope.of(theta=10.0, rotary_size=SIZE))
    assert serde_scheme("cachegen", wrong, plugins).code(cache).bits > knowing.bits


def test_what_cant_be_measured_is_refused(llama: Model, plugins: Plugins, tmp_path: Path) -> None:
    with pytest.raises(UnknownPluginError, match=r"'zip'; installed: .*cachegen"):
        serde_scheme("zip", llama, plugins)
    with pytest.raises(ConfigError, match=r"has no option 'stepp'; it has .*step"):
        serde_scheme("cachegen:stepp=1", llama, plugins)
    with pytest.raises(ConfigError, match="'fine' isn't OPTION=VALUE"):
        serde_scheme("cachegen:fine", llama, plugins)
    with pytest.raises(ConfigError, match=r"--serde cachegen:step=coarse: step"):
        serde_scheme("cachegen:step=coarse", llama, plugins)
    with pytest.raises(ConfigError, match="calibrate the model"):
        serde_scheme("cachegen", llama, plugins, profile=tmp_path / "none.kvprofile")


def test_which_serdes_take_a_profile(plugins: Plugins) -> None:
    assert takes_profile("cachegen:step=fine", plugins)
    assert takes_profile("cachegen+lossless", plugins)
    assert not takes_profile("lossless", plugins)
    assert not takes_profile("cachegen:profile=x.kvprofile", plugins)


def test_a_profile_is_used_only_if_it_is_asked_for(
    llama: Model, plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_PROFILES", str(tmp_path))
    path = calibrate(llama, [ids(llama, 300, 5)], CalibrationOptions("t2")).save(tmp_path)
    cache = llama.prefill(ids(llama, 256))
    plain, given, found = (
        serde_scheme(words, llama, plugins, profile=profile).code(cache)
        for words, profile in (
            ("cachegen", None),
            ("cachegen", path),
            ("cachegen:profile=auto", None),
        )
    )
    assert plain.bits != given.bits == found.bits
    assert torch.equal(given.cache, found.cache)


@pytest.mark.parametrize(
    ("name", "bits", "most_error"),
    [
        ("int8 token+head", 8 + 16 / 64, 0.01),
        ("fp8 cast", 8, 0.04),
        ("KIVI 4/4", 5, 0.12),
        ("KIVI 2/2", 3, 0.5),
        ("TurboQuant k8v4", (8 + 4 + 16 / 64) / 2, 0.08),
        ("TurboQuant 4/4", 4 + 16 / 64, 0.12),
    ],
)
def test_references_count_all_bits(name: str, bits: float, most_error: float) -> None:
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(2, 2, 256, 3, 64, generator=generator).bfloat16()
    (scheme,) = (r for r in references.references() if r.name == name)
    coded = scheme.code(cache)
    assert coded.bits / cache.numel() == pytest.approx(bits)
    error = (coded.cache - cache).float().square().mean().sqrt()
    assert most_error / 4 < error < most_error


@pytest.mark.parametrize("name", ["CacheGen as shipped", "CacheGen, paper"])
def test_cachegens_bits_are_entropies_and_side_information(name: str) -> None:
    (scheme,) = (r for r in references.references() if r.name == name)
    noise = torch.randn(3, 2, 256, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    coded = scheme.code(noise)
    assert 2.5 < coded.bits / noise.numel() < 6.5
    assert 0.01 < (coded.cache - noise).float().square().mean().sqrt() < 0.4
    # A constant has no entropy: what is left are tables, scales and offsets, or anchors.
    constant = scheme.code(torch.ones_like(noise))
    side = (33 * 16 + 32 + 8) / 256 + 16 / 192 if "shipped" in name else 26 * (8 + 16 / 192) / 256
    assert constant.bits / noise.numel() == pytest.approx(side)
    assert torch.allclose(constant.cache.float(), torch.ones(()), atol=0.01)


def test_entropy_is_shannons() -> None:
    symbols = torch.tensor([[0.0, 0], [0, 1], [1, 2], [1, 3]])
    assert references._entropy_bits(symbols, 4).tolist() == pytest.approx([4.0, 8.0])


def test_progress_passes_everything_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(silent([1, 2], "counted")) == [1, 2]
    assert list(bars([1, 2], "counted")) == [1, 2]
    assert "counted" in capsys.readouterr().err
