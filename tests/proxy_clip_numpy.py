"""ProxyCLIP in numpy, written from the formulas of the papers: CLIP, DINO and ProxyCLIP.

It shares no code with the library. Weights are read from the models' state dicts by name.
"""

import math

import numpy as np

MEAN_CLIP = np.array([0.48145466, 0.4578275, 0.40821073])
STD_CLIP = np.array([0.26862954, 0.26130258, 0.27577711])
MEAN_IMAGENET = np.array([0.485, 0.456, 0.406])
STD_IMAGENET = np.array([0.229, 0.224, 0.225])
_ERF = np.vectorize(math.erf)


def weights_of(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def layer_norm(x, w, name, eps=1e-5):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + _ERF(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x, qkv, heads, causal=False):
    """Multi-head attention of one sequence [N, D], before the output projection."""
    n, d = x.shape
    c = d // heads
    q, k, v = np.split(qkv, 3, axis=-1)
    outs = []
    for h in range(heads):
        at = slice(h * c, (h + 1) * c)
        logits = q[:, at] @ k[:, at].T / math.sqrt(c)
        if causal:
            logits = np.where(np.tri(n, dtype=bool), logits, -np.inf)
        outs.append(softmax(logits) @ v[:, at])
    return np.concatenate(outs, axis=-1)


def clip_block(x, w, name, heads, causal=False):
    y = layer_norm(x, w, f"{name}.ln_1")
    qkv = y @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
    x = x + linear(attention(y, qkv, heads, causal), w, f"{name}.attn.out_proj")
    hidden = gelu(linear(layer_norm(x, w, f"{name}.ln_2"), w, f"{name}.mlp.c_fc"))
    return x + linear(hidden, w, f"{name}.mlp.c_proj")


def patches(image, kernel):
    """Patch embeddings [rows * columns, D] without bias, of an image [3, H, W]."""
    d, _, size, _ = kernel.shape
    rows, columns = image.shape[1] // size, image.shape[2] // size
    out = np.empty((rows * columns, d))
    for r in range(rows):
        for c in range(columns):
            piece = image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
            out[r * columns + c] = kernel.reshape(d, -1) @ piece.reshape(-1)
    return out


def bilinear(maps, size):
    """Resize maps [..., h, w] bilinearly, pixel centres at half-integers, edges repeated."""

    def along(length, new):
        at = np.clip((np.arange(new) + 0.5) * length / new - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, length - 1)
        matrix = np.zeros((new, length))
        for i in range(new):
            matrix[i, low[i]] += 1 - (at[i] - low[i])
            matrix[i, high[i]] += at[i] - low[i]
        return matrix

    rows, columns = along(maps.shape[-2], size[0]), along(maps.shape[-1], size[1])
    return rows @ maps @ columns.T


def normalise(image, mean, std):
    return (image - mean[:, None, None]) / std[:, None, None]


def dino_features(image, w, depth, heads, size):
    """Normalised patch tokens of timm's ViT [rows * columns, D]."""
    x = patches(normalise(image, MEAN_IMAGENET, STD_IMAGENET), w["patch_embed.proj.weight"])
    x = np.concatenate([w["cls_token"][0], x + w["patch_embed.proj.bias"]]) + w["pos_embed"][0]
    for n in range(depth):
        y = linear(layer_norm(x, w, f"blocks.{n}.norm1", 1e-6), w, f"blocks.{n}.attn.qkv")
        x = x + linear(attention(x, y, heads), w, f"blocks.{n}.attn.proj")
        y = layer_norm(x, w, f"blocks.{n}.norm2", 1e-6)
        x = x + linear(gelu(linear(y, w, f"blocks.{n}.mlp.fc1")), w, f"blocks.{n}.mlp.fc2")
    return layer_norm(x, w, "norm", 1e-6)[1:]


def proxy_weights(features, beta, gamma):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit @ unit.T
    logits = (similarity - beta * similarity.mean()) * gamma
    return softmax(np.where(logits < 0, -np.inf, logits))


def text_embedding(tokens, w, depth, heads):
    """Embeddings of token sequences [P, context]; the end token has the largest number."""
    out = []
    for sequence in tokens:
        x = w["token_embedding.weight"][sequence] + w["positional_embedding"]
        # Later tokens do not act on the end token.
        x = x[: sequence.argmax() + 1]
        for n in range(depth):
            x = clip_block(x, w, f"transformer.resblocks.{n}", heads, causal=True)
        out.append(layer_norm(x[-1], w, "ln_final") @ w["text_projection"])
    return np.array(out)


def name_embedding(tokens, w, depth, heads):
    each = text_embedding(tokens, w, depth, heads)
    mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(axis=0)
    return mean / np.linalg.norm(mean)


def window_logits(image, clip, clip_heads, dino, dino_heads, names, beta=1.2, gamma=3.0):
    """Cosines [Q, H, W] of a window with the embeddings of names [Q, E]."""
    w = {k.removeprefix("visual."): v for k, v in clip.items() if k.startswith("visual.")}
    kernel = w["conv1.weight"]
    rows, columns = image.shape[1] // kernel.shape[-1], image.shape[2] // kernel.shape[-1]
    x = patches(normalise(image, MEAN_CLIP, STD_CLIP), kernel)
    x = np.concatenate([w["class_embedding"][None], x]) + w["positional_embedding"]
    x = layer_norm(x, w, "ln_pre")
    depth = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("transformer.resblocks."))
    for n in range(depth - 1):
        x = clip_block(x, w, f"transformer.resblocks.{n}", clip_heads)
    last = f"transformer.resblocks.{depth - 1}"
    d = x.shape[1]
    value = w[f"{last}.attn.in_proj_weight"][2 * d :], w[f"{last}.attn.in_proj_bias"][2 * d :]
    v = layer_norm(x[1:], w, f"{last}.ln_1") @ value[0].T + value[1]

    size = dino["patch_embed.proj.weight"].shape[-1]
    grid = image.shape[1] // size, image.shape[2] // size
    blocks = 1 + max(int(k.split(".")[1]) for k in dino if k.startswith("blocks."))
    features = dino_features(image, dino, blocks, dino_heads, size)
    v = bilinear(v.T.reshape(d, rows, columns), grid).reshape(d, -1).T
    y = linear(proxy_weights(features, beta, gamma) @ v, w, f"{last}.attn.out_proj")
    y = layer_norm(y, w, "ln_post") @ w["proj"]
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    return bilinear((y @ names.T).T.reshape(len(names), *grid), image.shape[1:])


def picture_logits(image, window, stride, logits_of):
    """Mean over the windows that cover each pixel; the last window ends at the border."""
    _, height, width = image.shape
    sums = counts = 0

    def starts(length):
        count = max(0, math.ceil((length - window) / stride)) + 1
        return [min(i * stride, length - window) for i in range(count)]

    for top in starts(height):
        for left in starts(width):
            part = logits_of(image[:, top : top + window, left : left + window])
            place = np.zeros((len(part), height, width))
            place[:, top : top + window, left : left + window] = part
            covered = np.zeros((height, width))
            covered[top : top + window, left : left + window] = 1
            sums, counts = sums + place, counts + covered
    return sums / counts
