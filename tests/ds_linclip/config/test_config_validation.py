"""One clear message for each mistake in a configuration."""

import re

import pytest

from ds_linclip.config import as_image_size, load_config

EMBEDDED = "ds_configs/train/embedded.yaml"
LUNA = "model.vision.attention.kind=luna"
#: Five image sizes, a step each.
RESOLUTIONS = ", ".join(f"{{from_step: {step}, image_size: {4 * (step + 8)}}}" for step in range(5))
GRAPHS = ["train.compile=towers", "train.cuda_graphs=true"]
NVME = ["zero.stage=3", "zero.offload_optimizer=nvme", "zero.nvme_path=/nvme"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key \(optim\.lrr\); did you mean optim\.lr"),
        ("batch_size=8", r"unknown key \(batch_size\); did you mean .*train\.global_batch_size"),
        ("model.visoin.width=8", r"unknown key \(model\.visoin.*did you mean model\.vision"),
        ("optim.lr=fast", r"^optim\.lr \(fast\) must be a finite number$"),
        (
            "model.text.attention.kind=flash",
            r"^model\.text\.attention\.kind \(flash\) must be .*\blinear, .*\bsoftmax\b",
        ),
        (
            "model.text.attention={kind: [softmax]}",
            r"^model\.text\.attention\.kind \(\['softmax'\]\) must be .*\bsoftmax\b",
        ),
        (
            "model.text.attention={kind: {a: '${name}'}}",
            r"^model\.text\.attention\.kind \(\{'a': .*\) must be .*\bsoftmax\b",
        ),
        (
            "model.text.attention_by_layer=[{layers: '0'}]",
            r"^model\.text\.attention_by_layer\[0\]\.attention must name its kind: ",
        ),
        (
            "model.text.attention_by_layer=[{attention: {kind: softmax}}]",
            r"^model\.text\.attention_by_layer\[0\]\.layers \(''\) must be an index or a slice",
        ),
        (
            "model.text.attention_by_layer=[{layers: -2:}]",
            r"^override \(.*\) must have a YAML value; quote what holds braces or colons: ",
        ),
        (
            "model.text.attention=softmax",
            r"^model\.text\.attention \(softmax\) must hold .*, as in \{kind: softmax\}$",
        ),
        (
            "model.vision.image_size=[30,32]",
            r"model\.vision\.image_size \(30, 32\) must be .* multiple of patch_size \(4\)",
        ),
        ("model.vision.image_size=[32,33]", r"image_size \(32, 33\) must be .*patch_size \(4\)"),
        ("model.vision.image_size=33", r"image_size \(33, 33\) must be .*patch_size \(4\)"),
        ("model.vision.image_size=0", r"image_size \(0, 0\) must be .*positive"),
        ("model.vision.patch_size=5", r"image_size \(32, 32\) must be .*patch_size \(5\)"),
        ("model.vision.patch_size=0", r"image_size \(32, 32\) must be .*patch_size \(0\)"),
        ("model.text.heads=3", r"model\.text\.width \(64\) must be a positive multiple of heads"),
        (
            "train.reduce_dtype=bf16",
            r"train\.reduce_dtype \(bf16\) needs train\.precision bf16 or amp_bf16, not \(fp32\)",
        ),
        ("train.steps=0", r"train\.steps \(0\) must be greater than 0"),
        ("train.steps=[1]", r"train\.steps \(\[1\]\) must be an integer"),
        ("train.samples=0", r"^train\.samples \(0\) must be greater than 0"),
        ("train.epochs=-1", r"^train\.epochs \(-1\.0\) must be greater than 0"),
        (
            "optim.schedule={kind: cosine, floor: 1.5}",
            r"^optim\.schedule\.floor \(1\.5\) must be in \[0, 1\]",
        ),
        (
            "optim.schedule={kind: cooldown, cooldown_steps: 100000}",
            r"^optim\.schedule\.cooldown_steps \(100000\) must be in 1\.\.\d+, the steps",
        ),
        (
            "optim.schedule={kind: cooldown}",
            r"^optim\.schedule\.cooldown_steps \(0\) must be in 1\.\.",
        ),
        (
            "optim.schedule={kind: cooldown, cooldown_steps: 2, power: 0}",
            r"^optim\.schedule\.power \(0\.0\) must be greater than 0",
        ),
        ("optim.schedule.kind=cosin", r"^optim\.schedule\.kind \(cosin\) must be .*did you mean"),
        ("optim.warmup_steps=100000", r"optim\.warmup_steps \(100000\) must be less than"),
        ("data.train=[]", r"data\.train \(\[\]\) must name at least one shard"),
        ("data.train=null", r"data\.train \(null\) must be a pattern or a list of sources"),
        ("data.train={shards: a.tar}", r"data\.train \(.*\) must be a pattern or a list"),
        ("data.train=", r"data\.train \(''\) must be a pattern or a list"),
        ("data.train=[[7]]", r"data\.train\[0\] \(\['7'\]\) must hold keys and values"),
        (
            "data.train=[{shrds: a.tar}]",
            r"key \(data\.train\[0\]\.shrds\); did you mean data\.train\[\*\]\.shards",
        ),
        ("data.train=[{weight: 1}]", r"data\.train\[0\]\.shards \(''\) must name shards"),
        ("data.train=''", r"data\.train\[0\]\.shards \(''\) must not be empty"),
        (
            "data.train=[{shards: a.tar, weight: 1}, b.tar]",
            r"data\.train\[1\]\.weight \(None\) must be set: all sources have one or none",
        ),
        (
            "data.train=[a.tar, {shards: b.tar, weight: 1}]",
            r"data\.train\[0\]\.weight \(None\) must be set: all sources have one or none",
        ),
        (
            "data.train=[{shards: a.tar, weight: 0}, {shards: b.tar, weight: 1}]",
            r"data\.train\[0\]\.weight \(0\.0\) must not be 0: leave the source out",
        ),
        (
            "data.train=[{shards: a.tar, weight: -1}]",
            r"train\[0\]\.weight \(-1\.0\) must be greater",
        ),
        ("data.train=[{shards: a.tar, weight: .inf}]", r"weight \(\.inf\) must be .*finite"),
        ("data.train=[{shards: a.tar, weight: .nan}]", r"weight \(\.nan\) must be .*finite"),
        ("data.train=[{shards: a.tar, upsampling: 0}]", r"upsampling \(0\.0\) must be greater"),
        (
            "data.train=[{shards: a.tar, upsampling: .inf}]",
            r"upsampling \(\.inf\) must be .*finite",
        ),
        (
            "data.train=[{shards: a.tar, upsampling: 2, weight: 1}]",
            r"data\.train\[0\]\.upsampling \(2\.0\) must be 1 with a weight \(1\.0\)",
        ),
        (
            "data.train=[{shards: a.tar, num_samples: 0}]",
            r"\[0\]\.num_samples \(0\) must be greater",
        ),
        ("data.resolutions=5", r"data\.resolutions \(5\) must be a list"),
        ("data.resolutions[0].image_size=32", r"must set the whole list, as in"),
        ("data.resolutions=[5]", r"data\.resolutions\[0\] \(5\) must hold keys and values"),
        (
            "data.resolutions=[{image_sise: 32}]",
            r"\[0\]\.image_sise\); did you mean .*data\.resolutions\[\*\]\.image_size",
        ),
        (
            "data.resolutions=[{from_step: 1, image_size: 32}]",
            r"data\.resolutions\[0\]\.from_step \(1\) must be 0",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 0, image_size: 16}]",
            r"data\.resolutions\[1\]\.from_step \(0\) must be greater than 0, the one before",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 800, image_size: 16}]",
            r"data\.resolutions\[1\]\.from_step \(800\) must be less than train\.steps \(800\)",
        ),
        (
            "data.resolutions=[{image_size: 32}, {from_step: 10, image_size: [32, 18]}]",
            r"data\.resolutions\[1\]\.image_size \(32, 18\) must be .*patch_size \(4\)",
        ),
        ("data.cache.max_gib=0", r"data\.cache\.max_gib \(0\.0\) must be greater than 0"),
        ("data.network.backoff=0", r"data\.network\.backoff \(0\.0\) must be greater than 0"),
        ("data.network.max_tries=0", r"data\.network\.max_tries \(0\) must be greater than 0"),
        ("data.network.read_timeout=.nan", r"data\.network\.read_timeout \(\.nan\) must be"),
        ("data.max_bad_samples=0", r"data\.max_bad_samples \(0\.0\) must be in \(0, 1\]"),
        ("data.max_bad_samples=1.5", r"data\.max_bad_samples \(1\.5\) must be in \(0, 1\]"),
        ("data.max_bad_in_a_row=0", r"data\.max_bad_in_a_row \(0\) must be greater than 0"),
        ("data.prefetch_batches=0", r"data\.prefetch_batches \(0\) must be greater than 0"),
        ("data.crop_scale={a: 1}", r"data\.crop_scale \({'a': '1'}\) must be a list of 2 numbers"),
        ("parallel.dp=3", r"train\.global_batch_size \(128\) must be .*\(3\): 126 or 129 would do"),
        ("name=a/b", r"name \('a/b'\) must be a plain folder name"),
        ("name=", r"name \(''\) must be a plain folder name"),
        ("name=..", r"name \('\.\.'\) must be a plain folder name"),
        ("name=a\nb", r"name \('a\\nb'\) must be a plain folder name, of printable"),
        (f"name={'é' * 128}", r"name \('é+'\) must be at most 255 bytes long"),
        ("train.steps=1e3", r"^train\.steps \(1e3\) must be an integer, in decimal digits$"),
        ("train.steps=0x10", r"train\.steps \(0x10\) must be an integer"),
        ("train.steps=12:30", r"train\.steps \(12:30\) must be an integer"),
        ("train.seed=9223372036854775808", r"train\.seed \(9223372036854775808\) must be an int"),
        ("train.steps=", r"train\.steps \(''\) must be an integer"),
        ("train.steps=true", r"train\.steps \(true\) must be an integer"),
        ("train.micro_batch_size=None", r"micro_batch_size \(None\) must be .*, or null"),
        ("optim.lr=1:30", r"optim\.lr \(1:30\) must be a finite number"),
        ("optim.lr=inf", r"optim\.lr \(inf\) must be a finite number"),
        ("optim.lr=1e999", r"optim\.lr \(1e999\) must be a finite number"),
        ("model.text.attention.score_scale=nan", r"score_scale \(nan\) must be a finite number"),
        ("train.compile=2", r"train\.compile \(2\) must be none, blocks or towers"),
        ("train.cuda_graphs=2", r"train\.cuda_graphs \(2\) must be true or false"),
        ("train.precision=fp8", r"train\.precision \(fp8\) must be bf16, amp_bf16, fp16 or fp32"),
        ("train=1", r"^train \(1\) must hold keys and values$"),
        ("output_dir=", r"^output_dir \(''\) must not be empty$"),
        ("output_dir=~no-such-user/x", r"output_dir \(~no-such-user/x\) must not begin with ~"),
        ("data.train={~/a,~/b}.tar", r"data\.train\[0\]\.shards \({~/a.*must not begin with ~"),
        (
            "output_dir=$LINCLIP_UNSET/x",
            r"output_dir: .*Environment variable 'LINCLIP_UNSET' not f",
        ),
        ("train.seed=-1", r"train\.seed \(-1\) must not be negative"),
        ("zero.stage=7", r"zero\.stage \(7\) must be"),
        ("parallel.tp=0", r"parallel\.tp \(0\) must be greater than 0"),
        (
            "parallel.tp=3",
            r"parallel\.tp \(3\) must divide model\.vision heads \(2\): 1 or 2 would do",
        ),
        (
            "parallel.pp=7",
            r"parallel\.pp \(7\) must be at most .*layers \(6\): a stage holds at least",
        ),
        ("parallel.cp=66", r"parallel\.cp \(66\) must be at most the number of tokens .*\(65\)"),
        (
            ["parallel.cp=2", "model.vision.attention.kind=softmax"],
            r"parallel\.cp \(2\) needs a model\.vision\.attention\.kind whose .* \(softmax\); take",
        ),
        (
            ["parallel.cp=2", "model.vision.attention={kind: inline, local: {kind: predicted}}"],
            r"attention\.local\.kind \(predicted\) with parallel\.cp \(2\) must be none",
        ),
        (
            ["parallel.cp=2", "model.vision.attention={kind: fast, qk_norm: max}"],
            r"vision\.attention\.qk_norm \(max\) with parallel\.cp \(2\) must be token: the",
        ),
        (
            "model.text.attention={kind: fast, qk_norm: max}",
            r"model\.text\.attention\.qk_norm \(max\) must be token in a text: the largest norm",
        ),
        (
            "model.text.attention={kind: fast, order: 3}",
            r"model\.text\.attention\.order \(3\) must be 1 or 2$",
        ),
        (
            "model.text.attention={kind: qt, form: half}",
            r"model\.text\.attention\.form \(half\) must be compact or full$",
        ),
        (
            "model.vision.attention={kind: inline, local: {kind: predicted, size: 5}}",
            r"local\.size",
        ),
        (
            ["parallel.pp=2", "zero.stage=3"],
            r"zero\.stage \(3\) must be 1 with parallel\.pp \(2\): .* take zero\.stage=1, or par",
        ),
        ("zero.offload_param=cpu", r"zero\.offload_param \(cpu\) needs zero\.stage 3, not \(1\)"),
        (
            "zero.offload_optimizer=nvme",
            r"offload_optimizer \(nvme\) needs zero\.stage 3, not \(1\)",
        ),
        (
            ["zero.offload_optimizer=nvme", "zero.stage=3"],
            r"zero\.offload_optimizer \(nvme\) needs a folder in zero\.nvme_path",
        ),
        (
            [*NVME, "optim.ema_decay=0.99"],
            r"optim\.ema_decay \(0\.99\) does not go with zero\.offload_optimizer \(nvme\)",
        ),
        ([*NVME, "optim.kind=lamb"], r"optim\.kind \(lamb\) does not go with .*_optimizer=cpu"),
        (
            ["parallel.dp=2", "train.micro_batch_size=48"],
            r"train\.micro_batch_size \(48\) must divide .* \(128 / 2 = 64\): 32 would do",
        ),
        (
            ["train.compile=blocks", "train.activation_checkpointing=selective"],
            r"train\.compile \(blocks\) needs .*activation_checkpointing none or full, not \(sel",
        ),
        (
            ["train.compile=true", "train.activation_checkpointing=selective", "zero.stage=3"],
            r"train\.compile \(towers\), which means blocks because zero\.stage is 3, needs ",
        ),
        (
            [*GRAPHS, "train.steps=9", f"data.resolutions=[{RESOLUTIONS}]"],
            r"towers that are one graph, but data\.resolutions has 5 image sizes \(at most 4\)",
        ),
        (
            "train.cuda_graphs=true",
            r"train\.cuda_graphs \(true\) needs train\.compile towers, not \(none\): take ",
        ),
        (
            [*GRAPHS, "zero.stage=3"],
            r"train\.cuda_graphs \(true\) needs towers that are one graph, but zero\.stage is 3",
        ),
        (
            [*GRAPHS, "parallel.device=cpu"],
            r"train\.cuda_graphs \(true\) needs parallel\.device cuda, not \(cpu\)",
        ),
        ([*GRAPHS, "parallel.tp=2"], r"train\.cuda_graphs .* needs parallel\.tp 1, not \(2\)"),
        ([*GRAPHS, "parallel.pp=2"], r"train\.cuda_graphs .* needs parallel\.pp 1, not \(2\)"),
        ("loss.chunk_size=0", r"loss\.chunk_size \(0\) must be greater than 0"),
        ("model.vision.patch_dropout=1", r"patch_dropout \(1\.0\) must be in \[0, 1\)"),
        ("model.vision.class_token=false", r"pool_type \(tok\) needs .*class_token=true"),
        ("model.vision.pool_type=map", r"pool_type \(map\) needs .*class_token=false"),
        (
            [
                *("model.vision.class_token=false", "model.vision.pool_type=map"),
                "model.vision.final_ln_after_pool=true",
            ],
            r"final_ln_after_pool \(true\) needs pool_type",
        ),
        (
            ["model.vision.proj_type=none", "model.embed_dim=32"],
            r"proj_type \(none\) needs model\.vision\.width \(\d+\) equal to .*embed_dim \(32\)",
        ),
        (
            ["parallel.cp=2", "model.vision.class_token=false", "model.vision.pool_type=map"],
            r"parallel\.cp \(2\) needs model\.vision\.pool_type tok or avg",
        ),
        (
            ["model.text.no_causal_mask=true", "model.text.attention={kind: mila}"],
            r"model\.text\.attention\.kind \(mila\) needs a grid of patches, or a text with",
        ),
        ("model.text.hf_tokenizer_name=x", r"hf_tokenizer_name \(x\) must be null in training"),
        ("model.text.vocab_size=1000", r"vocab_size \(1000\) must be at least 49408"),
        ("model.text.context_length=2", r"context_length \(2\) must be at least 3"),
        (
            "model.vision.head_width=8",
            r"attention\.kind \(linear\) needs a head dimension in 16\.\.256, not \(8\): 16",
        ),
        (
            [
                "model.vision.attention.kind=hedgehog",
                "model.vision.head_width=256",
                "model.vision.width=256",
            ],
            r"attention\.kind \(hedgehog\) needs a head dimension in 16\.\.128, not \(256\): 128",
        ),
        (
            [LUNA, "model.vision.attention.directions=3"],
            r"attention\.directions \(3\) must be in 4\.\.64 with 4 channels, .*: 4 would do",
        ),
        (
            [LUNA, "model.vision.attention.channels=32"],
            r"directions \(16\) must be in 1\.\.8 with 32 channels, .* <= 256: 8 would do",
        ),
        (
            [LUNA, "model.vision.attention.channels=0"],
            r"attention\.channels \(0\) must be in 1\.\.256: 1 would do",
        ),
        (
            [LUNA, "model.vision.attention.hidden=0"],
            r"attention\.hidden \(0\) must be at least 1",
        ),
        (
            ["model.vision.head_width=8", "model.vision.attention.kind=polaformer"],
            r"\(polaformer\) needs a head dimension in 16\.\.128 in steps of 2, not \(8\): 16",
        ),
        (
            ["model.vision.attention.kind=polaformer", "model.vision.attention.alpha=-1"],
            r"attention\.alpha \(-1\.0\) must not be negative",
        ),
        (
            [
                "model.vision.head_width=18",
                "model.vision.width=36",
                "model.vision.attention.kind=mila",
            ],
            r"\(mila\) needs a head dimension in 16\.\.256 in steps of 4, not \(18\): 16 would do",
        ),
        (
            ["model.text.attention.kind=mila", "model.text.attention.rotation_base=0.5"],
            r"text\.attention\.rotation_base \(0\.5\) must be at least 1",
        ),
        (
            ["parallel.cp=2", "model.vision.attention={kind: mila, local: {kind: depthwise}}"],
            r"attention\.local\.kind \(depthwise\) with parallel\.cp \(2\) must be none: neigh",
        ),
        (
            ["model.vision.attention.kind=focused", "model.vision.attention.power=0.5"],
            r"attention\.power \(0\.5\) must be at least 1",
        ),
        (
            ["model.vision.attention.kind=focused", "model.vision.attention.score_scale=1"],
            r"score_scale",
        ),
        (
            ["model.text.attention.kind=window", "model.text.attention.size=0"],
            r"^model\.text\.attention\.size \(0\) must be at least 1, the token itself$",
        ),
        (
            ["model.vision.attention.kind=window", "model.vision.attention.radius=-1"],
            r"^model\.vision\.attention\.radius \(-1\) must not be negative$",
        ),
        (
            ["model.vision.attention.kind=gated_delta", "model.vision.attention.conv_size=0"],
            r"^model\.vision\.attention\.conv_size \(0\) must be at least 1, the token itself$",
        ),
        (
            ["parallel.cp=2", "model.vision.attention.kind=gated_delta"],
            r"parallel\.cp \(2\) needs a model\.vision\.attention\.kind .* \(gated_delta\); take",
        ),
        (
            ["parallel.cp=2", "model.vision.attention.kind=window"],
            r"parallel\.cp \(2\) needs a model\.vision\.attention\.kind whose .* \(window\); take",
        ),
        (
            ["model.text.attention.kind=frequency", "model.text.attention.axis=tokens"],
            r"^model\.text\.attention\.axis \(tokens\) must be features: a transform over the tok",
        ),
        (
            ["parallel.cp=2", "model.vision.attention.kind=frequency"],
            r"parallel\.cp \(2\) needs a model\.vision\.attention\.kind whose .* \(frequency\)",
        ),
        (
            ["model.vision.attention.kind=frequency", "model.vision.attention.side=left"],
            r"model\.vision\.attention\.side \(left\) must be right or paper",
        ),
        ("watchdog.timeout_seconds=-1", r"watchdog\.timeout_seconds \(-1\.0\) must not be neg"),
        ("watchdog.timeout_seconds=.nan", r"watchdog\.timeout_seconds \(\.nan\) must be a finite"),
        ("watchdog.slow_rank_ratio=1", r"slow_rank_ratio \(1\.0\) must be greater than 1, or 0"),
        ("optim.lr=.nan", r"optim\.lr \(\.nan\) must be a finite number"),
        ("data.train=[/x/{0..9}.tar]", r"override \(data\.train.*\) must have a YAML value; quote"),
        ("steps", r"override \(steps\) must have the form key=value"),
    ],
)
def test_bad_value_is_named_with_its_rule(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [override] if isinstance(override, str) else override)


@pytest.mark.parametrize(
    "value", ["[8, 8, 8]", "[8]", "32.0", "[32.0, 32]", "big", "1e1", "true", "", "{}"]
)
@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("model.vision.image_size={}", "model.vision.image_size"),
        (
            "data.resolutions=[{{image_size: 32}}, {{from_step: 1, image_size: {}}}]",
            "data.resolutions[1].image_size",
        ),
    ],
)
def test_image_size_of_a_wrong_shape_is_named(override, name, value):
    rule = r" \(.*\) must be an integer or \[height, width\], in pixels"
    with pytest.raises(ValueError, match=f"^{re.escape(name)}{rule}$"):
        load_config(EMBEDDED, [override.format(value)])
    with pytest.raises(ValueError, match=f"^side{rule}$"):
        as_image_size("side", (8, 8.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "not valid YAML"),
        ("name: a\ntrain: {}\nname: b\n", "not valid YAML: it has the key name twice"),
        ("name: caf\udce9\n", "not valid YAML.*invalid continuation byte"),
        ("base: [a.yaml]\n", r"base \(\['a\.yaml'\]\) must be the path of one file"),
        ("name: [x]\n", r"run\.yaml: name \(\['x'\]\) must be text"),
        ("optim.lr: 1\n", r"run\.yaml: key \(optim\.lr\) must be written nested"),
        ("trian: {steps: 1}\n", r"run\.yaml: unknown key \(trian\); did you mean .*train"),
        ("- a\n- b\n", "must hold keys and values"),
        ("base: run.yaml\n", "circle"),
    ],
)
def test_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_interpolation_of_an_unknown_key_is_named():
    with pytest.raises(ValueError, match=r"embedded\.yaml: .*nme.* not found"):
        load_config(EMBEDDED, ["eval.data='/data/${nme}'"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("[{data: /a}]", r"eval\.sets\[0\]\.name \(''\) must be of letters, digits"),
        ("[{name: validation, data: /a}]", r"sets\[0\]\.name \('validation'\) must be .* not val"),
        ("[{name: a/b, data: /a}]", r"eval\.sets\[0\]\.name \('a/b'\) must be of letters"),
        ("[{name: a}]", r"eval\.sets\[0\]\.data \(None\) must name a held-out folder"),
        (
            "[{name: a, data: /a}, {name: a, data: /b}]",
            r"sets\[1\]\.name \(a\) must be that of one",
        ),
    ],
)
def test_held_out_sets_have_names_and_folders(sets, message):
    with pytest.raises(ValueError, match=message):
        load_config(EMBEDDED, [f"eval.sets={sets}"])
