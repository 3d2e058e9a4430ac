"""What a policy costs in quality: one harness for both engines. Knows no engine's insides."""
