"""What a plain model answers over two turns, and a patched one: nothing here uses the code under test.

A conversation is a prompt with images, a few greedy tokens, a second turn of the user, a few greedy tokens. Truth is
the plain model without a cache, on the whole text at every step, at positions and with tiles packed by hand.
"""

import inspect
import math

import torch

from ivl_kernels.testing.shipped import ShippedRouter, shipped_decision

TOKEN = 290
WORDS, VOCABULARY = 280, 300
NEW, SECOND = 3, (5, 6, 7)
GREEDY = dict(max_new_tokens=NEW, do_sample=False, suppress_tokens=list(range(WORDS, VOCABULARY)))
DELTA = 0.25
THRESHOLDS = (0.3, 0.1)
CACHE_NAMES = ("cache", "past_key_values")


def cache_names(model):
    """What this version calls the cache of a whole model: the name in its signature first."""
    return [name for name in CACHE_NAMES if name in inspect.signature(type(model).forward).parameters]


def cache_in(output):
    """The cache among the fields of an output, whatever the field is called."""
    values = output.values() if hasattr(output, "values") else output
    return next((v for v in values if hasattr(v, "get_seq_length") and hasattr(v, "update")), None)


def positions(ids, mask, delta=DELTA):
    """Position of every token by V2PE's rule, one token after the other: [B, N] float32."""
    out = torch.ones(ids.shape, dtype=torch.float64)
    for b in range(ids.shape[0]):
        last, inside = -1.0, False
        for n in range(ids.shape[1]):
            if not mask[b, n]:
                continue
            visual = int(ids[b, n]) == TOKEN
            if visual:
                last += delta
            else:  # after an image from the integer at or above its end, but for float error
                last = (math.ceil(last - 1e-6) if inside else last) + 1
            inside = visual
            out[b, n] = last
    return out.float()


def turns(model, batch, *, cached=False, fractional=False, cache_name=None, **options):
    """(tokens [B, 2 * NEW], logits of every step [2 * NEW, B, V]) of a model that takes ids and pixels."""
    ids, mask, cache, tokens, logits = batch["input_ids"], batch["attention_mask"], None, [], []
    fed = 0
    for turn in range(2):
        for _ in range(NEW):
            given = dict(options, attention_mask=mask)
            if cached:
                given |= {"input_ids": ids[:, fed:], "use_cache": True}
                if cache is not None:
                    given[cache_name or cache_names(model)[0]] = cache
            else:
                given |= {"input_ids": ids, "use_cache": False}
            if not cached or cache is None:
                given |= {"pixel_values": batch["pixel_values"]}
            if fractional:
                given["position_ids"] = positions(ids, mask) + (mask == 0).sum(1, keepdim=True)  # forward counts pads
            output = model(**given)
            fed = ids.shape[1]
            if cached:
                cache = cache_in(output)
                assert cache is not None and cache.get_seq_length() == fed
            logits.append(output.logits[:, -1].float())
            tokens.append(chosen(logits[-1]))
            ids, mask = append(ids, mask, tokens[-1])
        if turn == 0:
            ids, mask = append(ids, mask, torch.tensor([SECOND] * len(ids)))
    return torch.cat(tokens, 1), torch.stack(logits)


def chosen(logits):
    """Greedy, of the words alone: a placeholder in the text would be an image without pixels."""
    return logits[:, :WORDS].argmax(-1, keepdim=True)


def append(ids, mask, more):
    return torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)


def packed_by_hand(model, batch, flash):
    """(ids [1, N'], embeds [1, N', H], compressed [T]) of a native model's one row: both projectors for every tile."""
    ids, core = batch["input_ids"][0], model.model
    embeds = model.get_input_embeddings()(ids)
    vit = core.vision_tower(pixel_values=batch["pixel_values"]).last_hidden_state
    router = ShippedRouter(32).eval()
    router.load_state_dict({k: v for k, v in flash.state_dict().items() if not k.startswith("mlp2")})
    compressed = shipped_decision(router(vit), *THRESHOLDS)
    tiles = len(vit)
    grid = vit[:, 1:].reshape(tiles, 8, 8, 32)
    small = flash.mlp2(core.pixel_shuffle(grid, 0.25).reshape(tiles, 4, -1))
    full = core.multi_modal_projector(core.pixel_shuffle(grid, 0.5).reshape(tiles, 16, -1))
    keep = torch.ones_like(ids, dtype=torch.bool)
    where = (ids == TOKEN).nonzero().squeeze(1)
    for t in range(tiles):
        keep[where[16 * t + 4 : 16 * t + 16]] = not compressed[t]
    ids, embeds = ids[keep], embeds[keep]
    embeds[ids == TOKEN] = torch.cat([small[t] if compressed[t] else full[t] for t in range(tiles)])
    return ids[None], embeds[None], compressed


def packed_turns(model, batch, flash):
    """(tokens [1, 2 * NEW], logits [2 * NEW, 1, V], positions in the cache at the end) of a plain model."""
    ids, embeds, _ = packed_by_hand(model, batch, flash)
    tokens, logits = [], []
    for turn in range(2):
        for _ in range(NEW):
            output = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=False)
            logits.append(output.logits[:, -1].float())
            tokens.append(chosen(logits[-1]))
            embeds = torch.cat((embeds, model.get_input_embeddings()(tokens[-1])), 1)
        if turn == 0:
            embeds = torch.cat((embeds, model.get_input_embeddings()(torch.tensor([SECOND]))), 1)
    return torch.cat(tokens, 1), torch.stack(logits), embeds.shape[1] - 1


def generated_turns(model, batch, *, cache_name=None):
    """As `packed_turns`, from two calls of `generate`, the second on the cache of the first."""
    options = dict(GREEDY, return_dict_in_generate=True, output_logits=True)
    first = model.generate(**batch, **options)
    length = batch["input_ids"].shape[1]
    ids = torch.cat((first.sequences, torch.tensor([SECOND])), 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = model.generate(**given, **{cache_name or cache_names(model)[0]: cache_in(first)}, **options)
    tokens = torch.cat((first.sequences[:, length:], second.sequences[:, ids.shape[1] :]), 1)
    return tokens, torch.stack(first.logits + second.logits).float(), cache_in(second).get_seq_length()


def embedded(model, ids, features):
    """Embeddings of a remote-code model with the visual rows in place."""
    embeds = model.language_model.get_input_embeddings()(ids).clone()
    embeds[ids == TOKEN] = features
    return embeds


def chat_turns(model, batch, fractional=False):
    """As `turns`, of a plain remote-code model, which keeps no cache between turns."""
    ids, mask, tokens, logits = batch["input_ids"], batch["attention_mask"], [], []
    features = model.extract_feature(batch["pixel_values"]).flatten(0, 1)
    for turn in range(2):
        for _ in range(NEW):
            given = {"position_ids": positions(ids, mask)} if fractional else {}
            output = model.language_model(
                inputs_embeds=embedded(model, ids, features), attention_mask=mask, use_cache=False, **given
            )
            logits.append(output.logits[:, -1].float())
            tokens.append(chosen(logits[-1]))
            ids, mask = append(ids, mask, tokens[-1])
        if turn == 0:
            ids, mask = append(ids, mask, torch.tensor([SECOND] * len(ids)))
    return torch.cat(tokens, 1), torch.stack(logits)


def chat_generated_turns(model, batch):
    """Tokens [B, 2 * NEW] of two calls of a remote-code model's `generate`, the history given again as in its chat."""
    ids, mask, tokens = batch["input_ids"], batch["attention_mask"], []
    for turn in range(2):
        new = model.generate(
            pixel_values=batch["pixel_values"],
            input_ids=ids,
            attention_mask=mask,
            **GREEDY,
        )
        tokens.append(new)
        ids, mask = append(ids, mask, new)
        if turn == 0:
            ids, mask = append(ids, mask, torch.tensor([SECOND] * len(ids)))
    return torch.cat(tokens, 1)
