//! The virtual files, as a table: one row a file. A row says where the file is and how its text is made from a view; this
//! module knows nothing of FUSE, of containers or of where numbers come from.

pub mod cgroup;
pub mod meminfo;
pub mod swaps;
pub mod view;

use view::{Reader, Source, ViewError};

/// One file or directory below a container's directory.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// Part of inode numbers the kernel remembers over a change of daemon: a number once given is never given to another
    /// node, not even by a later release.
    pub number: u16,
    /// Below the container's directory. Parents have rows of their own.
    pub path: &'static str,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Directory,
    File(Render),
}

/// Which view a file is made from, and how.
#[derive(Debug, Clone, Copy)]
pub enum Render {
    Memory(fn(&view::MemoryView) -> String),
}

/// The container's directory itself.
pub const TOP: u16 = 1;

pub const TABLE: &[Node] = &[
    Node { number: TOP, path: "", kind: Kind::Directory },
    Node { number: 2, path: "proc", kind: Kind::Directory },
    Node { number: 3, path: "proc/meminfo", kind: Kind::File(Render::Memory(meminfo::render)) },
    Node { number: 4, path: "proc/swaps", kind: Kind::File(Render::Memory(swaps::render)) },
];

impl Node {
    pub fn numbered(number: u16) -> Option<&'static Self> {
        TABLE.iter().find(|node| node.number == number)
    }

    pub fn name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    pub fn children(&self) -> impl Iterator<Item = &'static Self> {
        let parent = self.path;
        TABLE.iter().filter(move |node| node.number != TOP && node.parent() == parent)
    }

    /// The path of the directory this node is in.
    pub fn parent(&self) -> &'static str {
        self.path.rsplit_once('/').map_or("", |(parent, _)| parent)
    }

    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory)
    }
}

/// The files that are to be bound over a container's own.
pub fn leaves() -> impl Iterator<Item = &'static str> {
    TABLE.iter().filter(|node| !node.is_directory()).map(|node| node.path)
}

impl Render {
    /// Reads what the view needs and makes the text.
    ///
    /// # Errors
    /// The host's own file not being readable; what a cgroup lacks is no error.
    pub fn text(self, source: &Source, reader: &Reader) -> Result<String, ViewError> {
        match self {
            Self::Memory(render) => source.memory(reader).map(|view| render(&view)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn numbers_are_unique_and_never_change() {
        let numbers: HashSet<_> = TABLE.iter().map(|node| node.number).collect();
        assert_eq!(numbers.len(), TABLE.len());
        assert!(!numbers.contains(&0));
        for (number, path) in [(1, ""), (2, "proc"), (3, "proc/meminfo"), (4, "proc/swaps")] {
            assert_eq!(Node::numbered(number).unwrap().path, path);
        }
    }

    #[test]
    fn every_node_is_found_from_the_top() {
        fn walk(node: &Node, found: &mut Vec<&'static str>) {
            found.push(node.path);
            node.children().for_each(|child| walk(child, found));
        }
        let mut found = Vec::new();
        walk(Node::numbered(TOP).unwrap(), &mut found);
        let mut all: Vec<_> = TABLE.iter().map(|node| node.path).collect();
        found.sort_unstable();
        all.sort_unstable();
        assert_eq!(found, all);
    }

    #[test]
    fn leaves_are_files_with_relative_paths() {
        assert_eq!(leaves().collect::<Vec<_>>(), ["proc/meminfo", "proc/swaps"]);
    }
}
