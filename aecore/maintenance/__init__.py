"""What keeps artefacts in order: `gc` removes what nobody needs, `compare` finds in what two artefacts differ."""
