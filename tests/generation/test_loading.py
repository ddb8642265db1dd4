"""A run folder or spelled-out models become a pipeline, or one line says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specstream import load_run
from specstream.drafters import (
    CutDraftModel,
    DraftModel,
    LookupFirst,
    PromptLookup,
    SpeculativeStreaming,
)
from specstream.generation import (
    AutoregressivePipeline,
    FixedLength,
    Limits,
    SpeculativePipeline,
    TextPipeline,
)
from specstream.generation.loading import build_pipeline, check_data_tokenizer
from specstream.models import PretrainedLM
from specstream.processors import TextProcessor
from specstream.sampling import Sampling
from specstream.verification import BlockRejection
from tests.run_folders import processor, save_run, save_target, tiny_lm

OTHER_TEXTS = ("What is the answer to the question?\n", "wxyz WXYZ wxyz WXYZ\n")


@pytest.fixture(scope="module")
def words() -> TextProcessor:
    return processor()


@pytest.fixture
def target(tmp_path: Path, words: TextProcessor) -> Path:
    return save_target(tmp_path / "target", words)


@pytest.fixture
def run(tmp_path: Path, target: Path, words: TextProcessor) -> Path:
    return save_run(tmp_path / "run", target, words)


def _text(pipeline: TextPipeline) -> str:
    return pipeline.complete(["def main"], seed=3)[0].text


def _spelled_out(target: Path, draft: Path) -> TextPipeline:
    lm = PretrainedLM(str(target), "float32")
    return build_pipeline(lm, lambda t: DraftModel(t, lambda: PretrainedLM(str(draft), "float32")))


def test_a_run_of_distillation_loads_with_its_target_and_all_options(run: Path) -> None:
    pipeline = load_run(
        run,
        sampling=Sampling(temperature=0),
        limits=Limits(max_new_tokens=7),
        verifier=BlockRejection(),
        lengths=FixedLength(2),
        dtype="float32",
        batch_size=2,
    )
    assert isinstance(pipeline, SpeculativePipeline)
    assert isinstance(pipeline.drafter, DraftModel)
    assert pipeline.target.dtype == torch.float32
    assert not any(p.requires_grad for p in pipeline.target.parameters())
    rows = pipeline.complete(["def f", "for line"])
    assert [len(row.tokens) for row in rows] == [7, 7]
    assert pipeline.stats.target_calls < 7 + 7


def test_a_run_of_language_modelling_decodes_plainly_from_both_its_folders(target: Path) -> None:
    for folder in (target, target.parent):
        assert isinstance(load_run(folder, dtype="float32"), AutoregressivePipeline)


def test_on_a_cpu_dtypes_are_a_cpus_even_where_there_is_a_gpu(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_run(run, device="cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    again = load_run(run, device="cpu")
    for pipeline in (plain, again):
        assert isinstance(pipeline, SpeculativePipeline)
        assert pipeline.drafter.model.dtype == torch.float32
    assert again.target.dtype == plain.target.dtype


def test_lookup_wraps_the_drafter_or_is_it(run: Path, target: Path) -> None:
    wrapped = load_run(run, lookup=True)
    alone = load_run(target, lookup=True)
    assert isinstance(wrapped, SpeculativePipeline) and isinstance(alone, SpeculativePipeline)
    assert isinstance(wrapped.drafter, LookupFirst)
    assert isinstance(wrapped.drafter.drafter, DraftModel)
    assert isinstance(alone.drafter, PromptLookup)


def test_models_spelled_out_generate_what_the_run_generates(run: Path, target: Path) -> None:
    ours = _spelled_out(target, run / "draft")
    theirs = load_run(run, dtype="float32")
    for pipeline in (ours, theirs):
        pipeline.lengths = FixedLength(3)  # type: ignore[attr-defined]
    assert _text(ours) == _text(theirs)


def test_a_drafter_can_be_cut_from_the_target_without_training(target: Path) -> None:
    lm = PretrainedLM(str(target), "bfloat16")
    pipeline = build_pipeline(
        lm, lambda t: CutDraftModel(t, 1, 0), lengths=FixedLength(2), sampling=Sampling(0.0)
    )
    assert isinstance(pipeline, SpeculativePipeline)
    assert pipeline.drafter.model.dtype == torch.bfloat16
    pipeline.complete(["def f"])
    assert pipeline.stats.acceptance is not None


@pytest.mark.parametrize("method", ["int8_weight_only", "int8_dynamic"])
def test_the_statistics_say_what_became_int8(method: str, run: Path) -> None:
    pipeline = load_run(run, quantize_models="drafter", quantize_method=method, dtype="float32")
    assert list(pipeline.stats.quantized) == ["drafter"]
    report = pipeline.stats.quantized["drafter"]
    assert isinstance(report, dict) and report["method"] == method and report["linear_layers"] > 0
    assert pipeline.stats.law == "the target's"  # which is as it was


def test_int8_that_would_be_compiled_wrongly_is_refused(run: Path) -> None:
    options = {"quantize_method": "int8_dynamic", "compile": True, "device": "cpu"}
    for models in ("target", "drafter"):
        with pytest.raises(ValueError, match="int8_dynamic is not computed right when it is comp"):
            load_run(run, quantize_models=models, **options)  # type: ignore[arg-type]
    load_run(run, **options)  # nothing becomes int8


@pytest.mark.parametrize("models", ["target", "drafter", "both"])
def test_streams_and_the_target_they_ride_in_are_not_made_int8(models: str, target: Path) -> None:
    lm = PretrainedLM(str(target), "float32")
    with pytest.raises(ValueError, match="SpeculativeStreaming shares the target's weights"):
        build_pipeline(lm, SpeculativeStreaming, quantize_models=models)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run folder at .*nope"):
        load_run(tmp_path / "nope")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither draft/ nor model/"):
        load_run(tmp_path)


def test_a_moved_target_is_named(run: Path, target: Path) -> None:
    shutil.rmtree(target)
    with pytest.raises(ValueError, match=r"no model folder at .*target"):
        load_run(run)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"drafter": {"class_path": "x.Y"}}',
        '{"drafter": {"class_path": "x.Y", "init_args": [1]}, "target": {"path": "x"}}',
    ],
)
def test_a_damaged_record_is_one_line(run: Path, text: str) -> None:
    (run / "draft" / "specstream.json").write_text(text)
    with pytest.raises(ValueError, match=r"specstream\.json' is damaged"):
        load_run(run)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("annotations", {}, "names specstream.drafters.annotations, not a specstream drafter"),
        ("Drafter", {}, "names specstream.drafters.Drafter, not a specstream drafter"),
        ("PromptLookup", {"max_ngrm": 3}, "option 'max_ngrm' is not accepted by PromptLookup; did"),
        ("PromptLookup", {"max_ngram": "x"}, r"specstream.json' makes no PromptLookup: '<"),
        ("LookupFirst", {}, r"makes no LookupFirst: .* missing 1 required positional argument"),
    ],
)
def test_a_record_of_what_is_no_drafter_is_one_line(
    run: Path, name: str, options: dict[str, object], line: str
) -> None:
    path = run / "draft" / "specstream.json"
    named = {"class_path": f"specstream.drafters.{name}", "init_args": options}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"drafter": named}))
    with pytest.raises(ValueError, match=line):
        load_run(run)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_weights_are_one_line(run: Path, keep: float) -> None:
    weights = run / "draft" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match=r"cannot load a model from .*draft"):
        load_run(run)


def test_weights_without_a_tensor_are_refused_rather_than_drawn_at_random(run: Path) -> None:
    weights = run / "draft" / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj"):
        load_run(run)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_file_of_the_target_is_one_line(run: Path, target: Path, name: str) -> None:
    (target / name).write_text('{"model_type": ')
    with pytest.raises(ValueError, match="target") as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_vocabularies_of_different_size_are_refused(tmp_path: Path, target: Path) -> None:
    tiny_lm(vocab_size=320).save(tmp_path / "wide", processor().tokenizer)
    with pytest.raises(ValueError, match="drafter has a vocabulary of 320, target one of 300"):
        _spelled_out(target, tmp_path / "wide")


def test_data_in_another_tokenizers_tokens_are_refused(tmp_path: Path, target: Path) -> None:
    lm = PretrainedLM(str(target))
    check_data_tokenizer(lm, processor())
    with pytest.raises(ValueError, match=r"not that of target .* token \d+ is .* in the data"):
        check_data_tokenizer(lm, processor(OTHER_TEXTS))


def test_other_tokens_behind_the_same_ids_are_refused(tmp_path: Path, target: Path) -> None:
    tiny_lm().save(tmp_path / "other", processor(OTHER_TEXTS).tokenizer)
    with pytest.raises(ValueError, match=r"different tokenizers: token \d+ is .* for the drafter"):
        _spelled_out(target, tmp_path / "other")


def test_a_tokenizer_saved_with_other_settings_is_the_same(tmp_path: Path, target: Path) -> None:
    own = processor().tokenizer
    own.add_tokens(["<extra>"])
    tiny_lm().save(tmp_path / "same", own)
    assert _spelled_out(target, tmp_path / "same") is not None


def test_a_draft_model_without_a_tokenizer_is_taken_at_its_word(
    tmp_path: Path, target: Path
) -> None:
    tiny_lm().save(tmp_path / "bare")
    assert _spelled_out(target, tmp_path / "bare") is not None


def test_a_target_that_is_not_on_disk_has_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="a folder or the hub, not UntrainedLM"):
        build_pipeline(tiny_lm())


@pytest.mark.parametrize(
    "options",
    [{"verifier": BlockRejection()}, {"lengths": FixedLength(3)}, {"quantize_models": "drafter"}],
)
def test_options_of_drafting_need_a_drafter(target: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="there is no drafter"):
        load_run(target, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_does_not_exist_is_refused(run: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}'"):
        load_run(run, device=device)


def test_a_model_with_alibi_positions_is_refused_before_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(ValueError, match="'bloom' uses ALiBi positions, which are not supported"):
        load_run(tmp_path)
