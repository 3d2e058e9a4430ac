"""What makes each table of the documents, from result rows; see tables.py."""
