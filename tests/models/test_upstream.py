"""How upstream's code is entered: bodies with a name replaced, arguments, caches, deferred tensors."""

import functools

import pytest
import torch

from ivl_kernels.models import upstream


def helper(x):
    return x


def body(self, x, *, scale=3, **rest):
    return helper(x) * scale


def deprecated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "old" in kwargs:
            kwargs["x"] = kwargs.pop("old")
        return function(*args, **kwargs)

    return wrapper


def hidden(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return wrapper.__wrapped__(*args, **kwargs)

    return wrapper


def test_a_body_with_a_name_replaced_keeps_the_rest():
    ours = upstream.renamed(body, helper=lambda x: x + 1)
    assert ours(None, 1) == 6 and ours(None, 1, scale=1) == 2 and body(None, 1) == 3
    assert upstream.signature(ours) == upstream.signature(body) and ours.__qualname__ == body.__qualname__
    twice = upstream.renamed(deprecated(deprecated(body)), helper=lambda x: x + 1)
    assert twice(None, old=1) == 6
    with pytest.raises(ValueError, match="a decorator does not hold what it wraps"):
        upstream.renamed(hidden(body), helper=None)
    assert upstream.uses(deprecated(body), "helper") and not upstream.uses(body, "other")


def test_arguments_are_found_by_name_wherever_they_stand():
    given = upstream.arguments(body, None, 1, other=5)
    assert given["x"] == 1 and given["other"] == 5 and "rest" not in given
    with pytest.raises(TypeError):
        upstream.arguments(body, None)


class Cache:
    def get_seq_length(self):
        return torch.tensor(4)

    def update(self):
        pass


def test_the_cache_is_what_behaves_like_one():
    cache = Cache()
    for name in ("cache", "past_key_values", "anything"):
        assert upstream.cache_of({"x": 1, name: cache}) is cache
    assert upstream.cache_of({"use_cache": True}) is None
    assert upstream.filled(cache) == 4 and upstream.filled(None) == 0
    with pytest.raises(TypeError, match="past_key_values: got a tuple"):
        upstream.cache_of({"past_key_values": ((torch.ones(1),),)})


class Layer:
    def __init__(self, sliding, length, kept):
        self.is_sliding, self._length, self.keys = sliding, length, torch.full((1, 2, kept, 3), float(sliding))

    def get_seq_length(self):
        return self._length


def test_keys_are_those_of_a_layer_that_keeps_all():
    cache = Cache()
    cache.layers = [Layer(False, 4, 4), Layer(True, 4, 4)]  # the second one has not forgotten anything yet
    assert torch.equal(upstream.keys_at(cache, 3), torch.zeros(1, 2, 3)) and upstream.keys_at(cache, 4) is None
    cache.layers = cache.layers[1:]
    assert upstream.keys_at(cache, 3) is None


class Two(upstream.Deferred):
    def tensor(self):
        return torch.tensor([2.0, 3.0])


def test_a_deferred_tensor_becomes_one_wherever_it_is_used():
    two, real = Two(), torch.tensor([2.0, 3.0])
    assert torch.equal(two + 1, real + 1) and torch.equal(1 - two, 1 - real) and torch.equal(two * two, real * real)
    assert torch.equal(-two, -real) and torch.equal(two[1:], real[1:]) and len(two) == 2 and bool((two == real).all())
    assert torch.equal(torch.cat([two, real]), torch.cat([real, real]))
    assert torch.equal(torch.stack((two, two), dim=0), torch.stack((real, real)))
    assert torch.equal(torch.where(two > 2, input=two, other=real), real) and two.shape == (2,)
