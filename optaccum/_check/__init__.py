"""Every refusal: what may be passed, and what the errors say."""
