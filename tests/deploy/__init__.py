"""Tests of deploy/, none of which needs Docker or a cluster."""
