"""Which provider is asked for, and that a fall to the CPU is never hidden."""

from __future__ import annotations

import pytest

from featherbed.errors import EngineError, MissingError, OptionError
from featherbed.run.providers import NAMES, PROVIDERS, check_used, choose

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
COREML, OPENVINO = "CoreMLExecutionProvider", "OpenVINOExecutionProvider"
AZURE = "AzureExecutionProvider"  # in every stock wheel, and never ours to use
CPU_BUILD = (AZURE, CPU)
GPU_BUILD = ("TensorrtExecutionProvider", CUDA, AZURE, CPU)
MAC_BUILD = (COREML, AZURE, CPU)
OPENVINO_BUILD = (OPENVINO, CPU)


@pytest.mark.parametrize(
    ("name", "available", "chosen"),
    [
        ("cpu", CPU_BUILD, (CPU,)),
        ("cpu", GPU_BUILD, (CPU,)),
        ("cuda", GPU_BUILD, (CUDA, CPU)),
        ("coreml", MAC_BUILD, (COREML, CPU)),
        ("openvino", OPENVINO_BUILD, (OPENVINO, CPU)),
    ],
)
def test_the_one_asked_for_comes_first_and_the_cpu_behind_it(
    name: str, available: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    assert choose(name, available) == chosen


@pytest.mark.parametrize(
    ("available", "chosen"),
    [
        (CPU_BUILD, (CPU,)),
        (GPU_BUILD, (CUDA, CPU)),
        (MAC_BUILD, (CPU,)),
        (OPENVINO_BUILD, (CPU,)),
        ((OPENVINO, COREML, CUDA, CPU), (CUDA, CPU)),
    ],
)
def test_auto_is_cuda_or_the_cpu_and_nothing_else(available: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    assert choose("auto", available) == chosen


@pytest.mark.parametrize("name", PROVIDERS)
def test_one_that_the_build_lacks_is_missing_and_the_message_names_the_package(name: str) -> None:
    available = [AZURE, *(p.execution for p in PROVIDERS.values() if p.name != name)]
    with pytest.raises(MissingError) as caught:
        choose(name, available)
    assert caught.value.exit_code == 3
    assert f"pip install {PROVIDERS[name].package}" in caught.value.remedy
    assert PROVIDERS[name].execution in caught.value.expected
    assert all(execution in caught.value.found for execution in available)


@pytest.mark.parametrize("name", ["cuda", "openvino"])
def test_the_package_replaces_the_installed_one_for_they_share_a_folder(name: str) -> None:
    with pytest.raises(
        MissingError, match="pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-openvino; pip install"
    ):
        choose(name, CPU_BUILD)


def test_coreml_elsewhere_is_said_to_exist_on_macos_only() -> None:
    with pytest.raises(MissingError, match="CoreML exists on macOS only") as caught:
        choose("coreml", CPU_BUILD)
    assert "uninstall" not in str(caught.value)


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_build_without_any_provider_is_no_cpu_build(name: str) -> None:
    with pytest.raises(MissingError, match="found none"):
        choose(name, ())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("CUDA", "cuda"),
        ("cuda:0", "cuda"),
        ("gpu", "cuda"),
        ("onnxruntime-gpu", "cuda"),
        ("CUDAExecutionProvider", "cuda"),
        ("CoreMLExecutionProvider", "coreml"),
        ("core-ml", "coreml"),
        ("open_vino", "openvino"),
        ("Auto", "auto"),
        ("cpus", "cpu"),
    ],
)
def test_an_unknown_name_is_refused_with_the_near_one(typed: str, meant: str) -> None:
    for refuse in (lambda: choose(typed, GPU_BUILD), lambda: check_used(typed, [CPU], "model.onnx")):
        with pytest.raises(OptionError) as caught:
            refuse()
        assert caught.value.remedy == f"did you mean {meant}?"
        assert all(name in caught.value.expected for name in NAMES)


@pytest.mark.parametrize("typed", ["", "TensorrtExecutionProvider", "rocm", "dml", "mps", "Azure"])
def test_a_name_near_to_none_gets_no_guess(typed: str) -> None:
    with pytest.raises(OptionError, match="choose one of these"):
        choose(typed, GPU_BUILD)


@pytest.mark.parametrize(
    ("asked", "used", "real"),
    [
        ("cpu", [CPU], "cpu"),
        ("cuda", [CUDA, CPU], "cuda"),
        ("coreml", [COREML, CPU], "coreml"),
        ("openvino", [OPENVINO, CPU], "openvino"),
        ("auto", [CUDA, CPU], "cuda"),
        ("auto", [CPU], "cpu"),
    ],
)
def test_what_a_session_has_is_told_by_its_short_name(asked: str, used: list[str], real: str) -> None:
    assert check_used(asked, used, "model.onnx") == real


@pytest.mark.parametrize(("asked", "hint"), [("cuda", "nvidia-smi"), ("coreml", "macOS"), ("openvino", "OpenVINO's")])
def test_a_fall_to_the_cpu_is_an_error_for_one_asked_for_by_name(asked: str, hint: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_used(asked, [CPU], "model.onnx")
    assert caught.value.subject == "model.onnx"
    assert PROVIDERS[asked].execution in caught.value.expected
    assert caught.value.found == CPU
    assert hint in caught.value.remedy
    assert caught.value.remedy.endswith("or ask for 'cpu'")


def test_another_accelerator_than_the_one_asked_for_is_an_error_too() -> None:
    with pytest.raises(EngineError, match="found CUDAExecutionProvider, CPUExecutionProvider"):
        check_used("openvino", [CUDA, CPU], "model.onnx")
    with pytest.raises(EngineError, match=r"install onnxruntime again$"):
        check_used("cpu", [CUDA, CPU], "model.onnx")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("available", [CPU_BUILD, GPU_BUILD, MAC_BUILD, OPENVINO_BUILD])
def test_a_session_that_kept_what_was_chosen_always_passes(name: str, available: tuple[str, ...]) -> None:
    try:
        chosen = choose(name, available)
    except MissingError:
        return
    assert PROVIDERS[check_used(name, chosen, "model.onnx")].execution == chosen[0]
