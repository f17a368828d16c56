"""The tests of data have a cache of their own."""

from tests.helpers.own_cache import own_cache as own_cache
