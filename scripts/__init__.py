"""What uses fnl_hf without being a part of it; a package so that the tests can import `scripts.coverage`."""
