// One model file in transformers.js, the same lines in Node and in a browser.
// The job and the answer are those of python.py; `library` is the module @huggingface/transformers.

// what transformers.js calls files by their suffixes; others by their name, as fp32, whose suffix is none
const DTYPES = {
  "": "fp32", _fp16: "fp16", _quantized: "q8", _int8: "int8", _uint8: "uint8", _q4: "q4", _q4f16: "q4f16", _bnb4: "bnb4",
};

export async function tried(library, job, device) {
  const { AutoModel, AutoTokenizer, env } = library;
  env.allowRemoteModels = false;
  env.localModelPath = job.above;
  const versions = { "transformers.js": env.version };
  try {
    const tokenizer = await AutoTokenizer.from_pretrained(job.name);
    const suffix = job.file.replace(/^onnx\/model/, "").replace(/\.onnx$/, "");
    const options = suffix in DTYPES ? { dtype: DTYPES[suffix] } : { dtype: "fp32", model_file_name: `model${suffix}` };
    const model = await AutoModel.from_pretrained(job.name, { ...options, device });
    const embed = async (rows) => {
      const texts = rows.map(([kind, text]) => (job.prompts[kind] ?? "") + text);
      const inputs = tokenizer(texts, { padding: true, truncation: true });
      const outputs = await model(inputs);
      const vectors = outputs[job.output] ?? outputs.last_hidden_state;
      return pooled(vectors, inputs.attention_mask, job.pooling);
    };
    const single = [];
    for (const row of job.texts) single.push(...(await embed([row])));
    return { vectors: single, batched: await embed(job.texts), versions };
  } catch (error) {
    return { error: String(error?.message ?? error).slice(0, 2000), versions };
  }
}

// The graph in a session of onnxruntime-web itself, whose WASM is another build than the one in transformers.js.
export async function alone(library, ort, job) {
  const { AutoTokenizer, env } = library;
  env.allowRemoteModels = false;
  env.localModelPath = job.above;
  const versions = { "onnxruntime-web": ort.env.versions.web };
  try {
    const tokenizer = await AutoTokenizer.from_pretrained(job.name);
    const folder = `${job.above}${job.name}/`;
    const externalData = job.beside.map((file) => ({ path: file.split("/").pop(), data: folder + file }));
    const session = await ort.InferenceSession.create(folder + job.file, { executionProviders: ["wasm"], externalData });
    const wanted = job.output;
    const embed = async (rows) => {
      const texts = rows.map(([kind, text]) => (job.prompts[kind] ?? "") + text);
      const inputs = tokenizer(texts, { padding: true, truncation: true });
      const feeds = {};
      for (const name of session.inputNames) {
        const { data, dims } = inputs[name] ?? inputs.input_ids;
        feeds[name] = new ort.Tensor("int64", name in inputs ? data : new BigInt64Array(data.length), dims);
      }
      const found = (await session.run(feeds, [wanted]))[wanted];
      const floats = new library.Tensor(found.type, found.data, found.dims);
      return pooled(floats, inputs.attention_mask, job.pooling);
    };
    const single = [];
    for (const row of job.texts) single.push(...(await embed([row])));
    return { vectors: single, batched: await embed(job.texts), versions };
  } catch (error) {
    return { error: String(error?.message ?? error).slice(0, 2000), versions };
  }
}

function pooled(found, mask, pooling) {
  const rows = found.to("float32").tolist();
  if (found.dims.length === 2) return rows;
  const real = mask.tolist().map((row) => row.map(Number));
  return rows.map((tokens, at) => {
    const kept = tokens.filter((_, place) => real[at][place] > 0);
    if (pooling === "cls") return tokens[0];
    if (pooling === "lasttoken") return kept[kept.length - 1];
    return kept[0].map((_, axis) => kept.reduce((sum, token) => sum + token[axis], 0) / kept.length);
  });
}
