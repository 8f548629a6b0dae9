package main

// The mutants of TestMutants, by what they break.
var mutants = []mutant{
	{
		name: "a follower acknowledges an append before its sync", file: "raft.go",
		before: `	n.send(append(n.acks, early...))`,
		after:  `	n.send(slices.Concat(n.acks, early, late))`,
		test:   "TestSim$",
	},
	{
		name: "what comes on a lane is not looked at", file: "peerlane.go",
		before: `			if err := n.validateMessage(m); err != nil {
				n.refusedAnswer(err)
				continue`,
		after: `			if err := n.validateMessage(m); err != nil {
				n.refusedAnswer(err)`,
		test: "TestHostileLane",
	},
	{
		name: "a lane speaks for strangers", file: "peerlane.go",
		before: `from != ln.peer && !n.isMember(from)`,
		after:  `from == 0`,
		test:   "TestHostileLane",
	},
	{
		name: "heartbeats wait behind appends that a peer does not take", file: "peerlane.go",
		before: `	return c.mu.over || len(c.mu.behind) > 0`,
		after:  `	return c.mu.over`,
		test:   "TestPeerThatDoesNotRead|TestLanesCarry",
	},
	{
		name: "a leader waits for a follower that is gone", file: "gather.go",
		before: `		if last >= n.before && last < n.stable {`,
		after:  `		if last < n.stable {`,
		test:   "TestLeaderAwaitsOthers",
	},
	{
		name: "a leader waits for a follower that is slow, without end", file: "gather.go",
		before: `			return n.until.Sub(n.time())`,
		after:  `			return time.Hour`,
		test:   "TestLeaderAwaitsOthers",
	},
	{
		name: "an error of the log is swallowed", file: "storage.go",
		before: `	if err != nil {
		return fmt.Errorf("%w: write log: %w", errDurability, err)
	}`,
		after: `	if err != nil {
		d.log.Warn("write log", zap.Error(err))
	}`,
		test: "TestProcessSyncFails",
	},
	{
		name: "a vote is not synced", file: "storage.go",
		before: `	if !promises && len(ents) == 0 {`,
		after:  `	if len(ents) == 0 {`,
		test:   "TestSim$|TestCrashImages|TestOrderOfDurability|TestSyncMark",
	},
	{
		name: "a read does not wait for a commit of this term", file: "read.go",
		before: `		return n.committedTerm == n.now.term`,
		after:  `		return true`,
		test:   "TestOwnReadWaitsForTheTerm",
	},
	{
		name: "the context of a read is used again", file: "read.go",
		before: `rand.Read(ctx)`,
		after:  `rand.Read(ctx[:0])`,
		test:   "TestSim$",
	},
	{
		name: "a read does not wait until its index is applied", file: "read.go",
		before: `		n.applied.Call(s.Index, func() {`,
		after:  `		n.applied.Call(0, func() {`,
		test:   "TestSim$",
	},
	{
		name: "a batch that was proposed again applies twice", file: "kv/state.go",
		before: `	if b.Node != 0 && !s.admit(b.Node, b.Boot, b.Seq) {`,
		after:  `	if b.Node != 0 && !s.admit(b.Node, b.Boot, b.Seq) && false {`,
		test:   "Replay|Model",
	},
	{
		name: "replay windows are not in snapshots", file: "kv/snapshot.go",
		before: `	for i := range s.windows {
		buf = s.windows[i].append(buf[:0])`,
		after: `	for i := range s.windows[:0] {
		buf = s.windows[i].append(buf[:0])`,
		test: "Snapshot",
	},
	{
		name: "idempotency results are not in snapshots", file: "kv/sections.go",
		before: `		bw.write(buf)
		bw.write(bytesOf(k.result))
`,
		after: `		_ = buf
`,
		test: "Sections|Snapshot|Once",
	},
	{
		name: "an idempotency key does not hold another request off", file: "kv/once.go",
		before: `	if k.fingerprint != c.Once.Fingerprint {`,
		after:  `	if false {`,
		test:   "Once",
	},
	{
		name: "a removed id may come back", file: "member.go",
		before: `	if m.isRemoved(x.ID) {
		return fmt.Errorf("%w: id %d was removed; choose`,
		after: `	if false {
		return fmt.Errorf("%w: id %d was removed; choose`,
		test: "TestMember|TestSim$",
	},
	{
		name: "a tick of a former leader counts", file: "clock.go",
		before: "c.Op == kv.OpTick && c.Tick.Term != term {",
		after:  "c.Op == kv.OpTick && c.Tick.Term > term+1<<40 {",
		test:   "TestTickRules|TestLateTick",
	},
	{
		name: "leases run twice as fast", file: "clock.go",
		before: "return c.reads + now.Sub(c.at).Milliseconds() }",
		after:  "return c.reads + 2*now.Sub(c.at).Milliseconds() }",
		test:   "TestSim$",
	},
	{
		name: "a lease starts before its grant was answered", file: "kv/lease.go",
		before: `		if !ok || uint64(w.at) > tick.Seen {`,
		after:  `		if !ok {`,
		test:   "Lease|Tick",
	},
	{
		name: "a watcher is not told that history was compacted", file: "read.go",
		before: `	if uint64(h.Compacted()) >= next {`,
		after:  `	if false {`,
		test:   "TestDispatcherFallsBehind",
	},
	{
		name: "a watch begins where the dispatcher has passed", file: "read.go",
		before: `if attempt < attempts && w.IsCut() {`,
		after:  `if false {`,
		test:   "TestSubscribe",
	},
	{
		name: "changes before the first watcher wait for the next one", file: "read.go",
		before: `			s.publishChanges() // apply saw no watcher`,
		after:  `			_ = attempt`,
		test:   "TestSubscribe",
	},
	{
		name: "a batch of events loses its first", file: "read.go",
		before: `		events = append(events, e)
		return true`,
		after: `		if len(events) > 0 || e.Revision%7 != 0 {
			events = append(events, e)
		}
		return true`,
		test: "TestSim$",
	},
	{
		name: "the log is released before the snapshot is recorded", file: "snapshot.go",
		before: `	if err := n.store.saveSnapshot(sn.Metadata); err != nil {
		return err
	}
	n.mem.newest, n.stateBytes = sn, d.size`,
		after: `	if err := n.store.release(index); err != nil {
		return err
	}
	if err := n.store.saveSnapshot(sn.Metadata); err != nil {
		return err
	}
	n.mem.newest, n.stateBytes = sn, d.size`,
		test: "TestOrderOfDurability|TestSim$",
	},
	{
		name: "a late answer says not_applied of a command on its way", file: "kvstore.go",
		before: `	select {
	case <-p.done: // applied just now
		return p.result, p.err
	default:
		return kv.Result{}, errCommitTimeout
	}`,
		after: `	return kv.Result{}, s.notProposed()`,
		test:  "TestDeadlineAfterProposalIsUnknown",
	},
	{
		name: "a member that stands aside votes", file: "aside.go",
		before: `	case raftpb.MsgVote, raftpb.MsgPreVote, raftpb.MsgTimeoutNow:
		return true`,
		after: `	case raftpb.MsgTimeoutNow:
		return true`,
		test: "TestAsideRules|TestNoLoss",
	},
	{
		name: "a member that stands aside votes again at once", file: "aside.go",
		before: `	if last <= n.aside.term.Load() {
		return nil
	}`,
		after: `	_ = last
`,
		test: "TestAsideRules|TestStandAside",
	},
	{
		name: "one of two voters stands aside", file: "aside.go",
		before: `	if others < len(voters)/2+1 {`,
		after:  `	if others < 1 {`,
		test:   "TestTooFewVoters",
	},
	{
		name: "a log that ends early is taken for torn", file: "synced.go",
		before: `	case c.Frames < m.frames:`,
		after:  `	case false:`,
		test:   "TestDamageIsNoticed|TestTornTail|TestCutLog",
	},
	{
		name: "a frame that cannot be read ends the log", file: "internal/wal/read.go",
		before: "later > 0",
		after:  "false",
		test:   "Torn|Damage",
	},
	{
		name: "a frame of a file's former life is read", file: "internal/wal/read.go",
		before: "|| c.frameNumber(h) != c.Frames+1 || frameChain(h) != c.chain",
		after:  "",
		test:   "Written",
	},
	{
		name: "the log goes on after an error", file: "internal/wal/wal.go",
		before: `	if l.broken = l.sync(); l.broken != nil {`,
		after: `	if err := l.sync(); err != nil {
		return err
	}
	if l.broken != nil {`,
		test: "NoSync",
	},
	{
		name: "a segment is released that is needed", file: "internal/wal/wal.go",
		before: "l.segments[1].first <= index {",
		after:  "l.segments[1].first <= index+20 {",
		test:   "List",
	},
	{
		name: "a snapshot is written over while it is sent", file: "storage.go",
		before: `		case d.mu.sent > 0: // it may be this one, and must not be written over`,
		after:  `		case false:`,
		test:   "TestPurgedSnapshot",
	},
	{
		name: "a snapshot written over an older file keeps its end", file: "storage.go",
		before: "f.Truncate(w.written), ",
		after:  "",
		test:   "TestPurgedSnapshot",
	},
	{
		name: "a snapshot that arrives is not checked", file: "peerreceive.go",
		before: `		err = fits(h)
	}
	if err == nil {
		err = f.Sync()`,
		after: `		_ = fits(h)
	}
	if err == nil {
		err = f.Sync()`,
		test: "TestHostileSnapshots|TestSim$",
	},
	{
		name: "a heartbeat's context may be of any length", file: "peer.go",
		before: "return len(c) == 0 || len(c) == 8",
		after:  "return true",
		test:   "TestRefusedMessages|TestEveryMessage",
	},
	{
		name: "a follower commits more than it holds", file: "raft.go",
		before: `		if m.GetCommit() > n.stable && m.GetTerm() >= n.now.term {`,
		after:  `		if false {`,
		test:   "TestMessagesThatNeedState",
	},
	{
		name: "a minority's digest wins", file: "divergence.go",
		before: `	case found && right != d.under.digest:`,
		after:  `	case found && right == d.under.digest:`,
		test:   "TestDivergedMemberStopsServing|TestDoubtEnds",
	},
	{
		name: "the digest leaves out results", file: "kv/state.go",
		before: `		results = append(results, s.run(&b.Commands[i], index))
		s.trace = results[len(results)-1].fold(s.trace)`,
		after: `		results = append(results, s.run(&b.Commands[i], index))`,
		test:  "Digest|Mark",
	},
	{
		name: "an append with a gap is joined", file: "raft.go",
		before: `	if before.GetIndex()+uint64(len(ents)) != m.GetIndex() || `,
		after:  `	if `,
		test:   "TestJoinedAppends|TestSim$",
	},
	{
		name: "an acknowledgement hides a later refusal", file: "raft.go",
		before: "i >= 0 && !m.GetReject() && !ms[i].GetReject() && ms[i].GetIndex() <= m.GetIndex()",
		after:  "i >= 0 && ms[i].GetIndex() <= m.GetIndex()",
		test:   "TestJoinedAnswers",
	},
	{
		name: "the members of a snapshot are those of later", file: "snapshot.go",
		before: `	h := snapHeader{Index: state.Applied(), Term: s.term, Members: s.table}`,
		after:  `	h := snapHeader{Index: state.Applied(), Term: s.term, Members: s.node.members.Load()}`,
		test:   "TestSim$",
	},
	{
		name: "an installed snapshot does not change the members", file: "snapshot.go",
		before: `	n.setMembers(h.Members)
`,
		after: "",
		test:  "TestSim$",
	},
	{
		name: "a leader that hears nobody goes on", file: "raft.go",
		before: `		CheckQuorum:               true,`,
		after:  `		CheckQuorum:               false,`,
		test:   "TestProcessChaos|TestSim$",
	},
	{
		name: "a start trusts memory after a failed sync", file: "recover.go",
		before: `	if err := wal.Settle(d.walDir()); err != nil`,
		after:  `	if err := error(nil); err != nil`,
		test:   "TestProcessLostSync",
	},
	{
		name: "a value can pass for a frame", file: "internal/wal/wal.go",
		before: "secret: rand.Uint64()",
		after:  "secret: 0 * rand.Uint64()",
		test:   "Forged",
	},
	{
		name: "a full disk ends the process over a snapshot", file: "snapshot.go",
		before: "case noRoom(d.err):",
		after:  "case false:",
		test:   "TestProcessDiskFull",
	},
	{
		name: "whoever leads by a new address is not answered", file: "peer.go",
		before: `	n.tr.AddPeer(id, []string{nowhere}) // does`,
		after:  `	// does`,
		test:   "TestStrangerIsAnswered",
	},
	{
		name: "a diverged member goes on serving", file: "read.go",
		before: `	return s.fit(ctx)
}

// get reads`,
		after: `	return nil
}

// get reads`,
		test: "TestDivergedMemberStopsServing",
	},
	{
		name: "a flip in memory is never looked for", file: "kv/digest.go",
		before: "if sum != s.sum",
		after:  "if false",
		test:   "Scrub",
	},
	{
		name: "a number of starts comes again", file: "sidecar.go",
		before: `	case d.exists():`,
		after:  `	case false:`,
		test:   "TestDamageIsNoticed",
	},
	{
		name: "entries that were replaced come back", file: "recover.go",
		before: `		r.entries = r.entries[:0]
`,
		after: "",
		test:  "TestReplacedEntries",
	},
	{
		name: "a write that failed is marked as synced", file: "storage.go",
		before: `	if err == nil {
		err = d.setMark(syncMark{d.wal.Frames(), d.hard.Term}, promises)`,
		after: `	{
		err = errors.Join(err, d.setMark(syncMark{d.wal.Frames(), d.hard.Term}, promises))`,
		test: "TestFailedWriteLeavesNoMark",
	},
	{
		name: "a start counts on the name of a segment", file: "internal/wal/read.go",
		before: `return errors.Join(datasync(f), forget(f), f.Close(), syncDir(dir))`,
		after:  `return errors.Join(datasync(f), forget(f), f.Close())`,
		test:   "TestCrashImages", in: ".",
	},
	{
		name: "a snapshot that is there already need not have a name on disk", file: "peerreceive.go",
		before: `		err = os.Remove(f.Name())
	} else {`,
		after: `		return os.Remove(f.Name())
	} else {`,
		test: "TestCrashImages",
	},
	{
		name: "the name of a new data directory is not synced", file: "storage.go",
		before: `	return syncDir(parent)`,
		after:  `	return nil`,
		test:   "TestCrashImages",
	},
	{
		name: "a kept snapshot's record is released", file: "internal/wal/wal.go",
		before: `l.segments[1].first <= index {`,
		after:  `l.segments[1].first <= index+1 {`,
		test:   "TestEitherKept", in: ".",
	},
	{
		name: "a removal counts who is connected", file: "reconfigure.go",
		before: "return v == n.id || n.answered[v] > asked",
		after:  "return v == n.id || asked > 0 || n.alive(v)",
		test:   "TestRemovalRestsOnAnswers",
	},
	{
		name: "a read forgets a peer's deadline", file: "peerreceive.go",
		before: "if !c.mu.until.IsZero() && ",
		after:  "if false && ",
		test:   "TestDrippingPeers",
	},
	{
		name: "a message may come at any pace", file: "peerreceive.go",
		before: `b.until = b.until.Add(`,
		after:  `b.until = time.Now().Add(`,
		test:   "TestBytesBuyTime|TestDrippingPeers",
	},
	{
		name: "what was refused may come at any pace", file: "peerreceive.go",
		before: `defer func() { readUntil(b.conn, time.Now().Add(peerPatience/10)) }()`,
		after:  `defer func() {}()`,
		test:   "TestBytesBuyTime|TestDrippingPeers",
	},
	{
		name: "a later tick of a leader may read less", file: "clock.go",
		before: `return max(c.read(now), own.reads+now.Sub(own.made).Milliseconds())`,
		after:  `return c.read(now)`,
		test:   "TestTicksOfOneLeader",
	},
	{
		name: "a founder without its data votes", file: "raft.go",
		before: ` || n.withholds(m) {`,
		after:  ` {`,
		test:   "TestFounderWithoutItsData",
	},
	{
		name: "any stranger moves leadership", file: "aside.go",
		before: "if !n.admit(w, r) {",
		after:  "if false {",
		test:   "TestWhoMayAskToYield",
	},
}
