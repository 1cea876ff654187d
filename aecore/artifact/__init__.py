"""What all artefacts share: claims, records and manifests (`commit`), detection (`kinds`), fan-out over parts, subsets for verify."""
