"""How to use a folder, elsewhere too: a snippet for each library, every one of them run by a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from featherbed.folder import ModelFolder
from featherbed.run.embedder import DOCUMENT_PROMPTS, QUERY_PROMPTS

HERE, ABOVE, NAME = "PATH/TO/THIS/FOLDER", "PATH/ABOVE/THIS/FOLDER", "NAME-OF-THIS-FOLDER"
ASKED, ANSWER = "how do I rotate a matrix?", "numpy.rot90 turns an array by 90 degrees."
DTYPES = {  # what transformers.js calls the files by their suffixes
    "": "fp32", "_fp16": "fp16", "_quantized": "q8", "_int8": "int8", "_uint8": "uint8", "_q4": "q4", "_q4f16": "q4f16",
    "_bnb4": "bnb4",
}  # fmt: skip


@dataclass(frozen=True)
class _Told:
    """What every snippet tells: the folder, the variant and its files, a query and a document behind their prompts."""

    folder: ModelFolder
    variant: str
    query: str
    document: str

    @property
    def files(self) -> tuple[str, ...]:
        return self.folder.manifest.variants[self.variant].files


def usage(folder: ModelFolder) -> str:
    """The section's text: featherbed, then the others, with the variant that "auto" takes, or the first."""
    variants = folder.manifest.variants
    good = [name for name in ("int8", "int8-block") if name in variants and variants[name].passed is not False]
    prompts = folder.manifest.spec.prompts

    def behind(names: tuple[str, ...], text: str) -> str:
        found = next((prompts[name] for name in names if prompts.get(name)), "")
        return (found + text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    told = _Told(
        folder,
        next(iter(good), next(iter(variants))),
        behind(QUERY_PROMPTS, ASKED),
        behind(DOCUMENT_PROMPTS, ANSWER),
    )
    return "\n".join(f"### {title}\n\n```{language}\n{code}```\n" for title, language, code in _snippets(told))


def _snippets(told: _Told) -> Iterator[tuple[str, str, str]]:
    """(title, language, code)."""
    yield "featherbed", "python", _featherbed(told)
    yield "sentence-transformers", "python", _sentence_transformers(told)
    yield "fastembed", "python", _fastembed(told)
    for name in (told.variant, *told.folder.manifest.variants):
        suffix = told.folder.manifest.variants[name].files[0].removeprefix("onnx/model").removesuffix(".onnx")
        if suffix in DTYPES:  # it finds files by these names only
            yield "transformers.js", "js", _transformers_js(told, DTYPES[suffix])
            break
    yield "onnxruntime alone", "python", _onnxruntime(told)


def _featherbed(told: _Told) -> str:
    return f"""from featherbed import Embedder

model = Embedder("{HERE}", variant="{told.variant}")
queries = model.encode_query(["{ASKED}"])
documents = model.encode_document(["{ANSWER}"])
print(model.similarity(queries, documents))
"""


def _sentence_transformers(told: _Told) -> str:
    return f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{HERE}", backend="onnx", model_kwargs={{"file_name": "{told.files[0]}"}})
queries = model.encode_query(["{ASKED}"])
documents = model.encode_document(["{ANSWER}"])
print(model.similarity(queries, documents))
"""


def _fastembed(told: _Told) -> str:
    name = f"{told.folder.manifest.name}-{told.variant}"
    sidecar = f"\n    additional_files={list(told.files[1:])!r}," if told.files[1:] else ""
    return f"""from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

TextEmbedding.add_custom_model(
    "{name}",
    pooling=PoolingType.DISABLED,
    normalization=True,
    output_name="sentence_embedding",
    sources=ModelSource(hf="{name}"),
    dim={told.folder.manifest.spec.dim},
    model_file="{told.files[0]}",{sidecar}
)
model = TextEmbedding("{name}", specific_model_path="{HERE}")
queries = list(model.embed(["{told.query}"]))
documents = list(model.embed(["{told.document}"]))
print(queries[0] @ documents[0])
"""


def _transformers_js(told: _Told, dtype: str) -> str:
    return f"""import {{ AutoModel, AutoTokenizer, env }} from "@huggingface/transformers";

env.localModelPath = "{ABOVE}";
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("{NAME}");
const model = await AutoModel.from_pretrained("{NAME}", {{ dtype: "{dtype}" }});
const inputs = tokenizer(["{told.query}", "{told.document}"], {{ padding: true, truncation: true }});
const {{ sentence_embedding }} = await model(inputs);
console.log(sentence_embedding.tolist());
"""


def _onnxruntime(told: _Told) -> str:
    spec = told.folder.manifest.spec
    types = '\nfeeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])' if spec.token_types else ""
    return f"""import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("{HERE}/tokenizer.json")
tokenizer.enable_padding(pad_id={spec.pad_id})
tokenizer.enable_truncation({spec.max_length})
rows = tokenizer.encode_batch(["{told.query}", "{told.document}"])
feeds = {{"input_ids": np.array([row.ids for row in rows])}}
feeds["attention_mask"] = np.array([row.attention_mask for row in rows]){types}
session = onnxruntime.InferenceSession("{HERE}/{told.files[0]}", providers=["CPUExecutionProvider"])
(vectors,) = session.run(["sentence_embedding"], feeds)
print(vectors @ vectors.T)
"""
