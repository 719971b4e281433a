"""forge within other projects' tools. Each module needs the project that it is named after."""
