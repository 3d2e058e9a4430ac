"""Result rows as one HTML page: reads what `eval` and `bench` wrote, runs no model."""
