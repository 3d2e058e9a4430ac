"""Tasks as plain text: what is asked, and how an answer is scored. Imports no engine."""
