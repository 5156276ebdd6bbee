"""One prompt, answered or continued."""
