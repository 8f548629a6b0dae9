package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"pontoon/internal/wal"
	"pontoon/kv"
)

// logStore is what the raft loop needs of the disk. Only the raft loop calls
// it. After any error the store must not be used again: the process ends
// before anything more is acknowledged.
type logStore interface {
	// save writes the hard state and the entries and returns once they are
	// on disk, as raft requires of a vote and of an append. Where only the
	// commit index moved, nothing waits for the disk.
	save(hs *raftpb.HardState, ents []*raftpb.Entry) error
	// saveSnapshot records in the log that a snapshot file is complete. The
	// file must be on disk before.
	saveSnapshot(meta *raftpb.SnapshotMetadata) error
	// install begins a new log after a snapshot that a leader sent. What the
	// old log held beyond it never was of this history.
	install(meta *raftpb.SnapshotMetadata, hs *raftpb.HardState, ents []*raftpb.Entry) error
	// release forgets the log that no kept snapshot needs any more.
	release(snapshotIndex uint64) error
	close() error
}

// errDurability marks an error of the log or of a snapshot write: exit code 3.
var errDurability = errors.New("the disk failed")

// errRefuse marks a data directory that this process must not use.
var errRefuse = errors.New("refusing to start")

// errDamaged marks, with errRefuse, a log or snapshots that lost or changed what
// was on disk. A member of a large enough cluster may stand aside (aside.go).
var errDamaged = errors.New("damaged")

// damaged is a refusal because of what d.load found.
func damaged(format string, args ...any) error {
	for _, arg := range args {
		if err, ok := arg.(error); ok && notTheDisk(err) {
			return fmt.Errorf("%w: %w; the data may be as good as ever: mend this and start again", errRefuse, err)
		}
	}
	return &damageError{fmt.Errorf(format, args...)}
}

// notTheDisk: what this process was refused says nothing of what is on the disk.
func notTheDisk(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM)
}

// damageError holds the damage alone; as an error it says what to do about it.
type damageError struct{ error }

func (e *damageError) Error() string {
	return errRefuse.Error() + ": " + e.error.Error() + "; " + replaceHint
}
func (e *damageError) Unwrap() []error { return []error{errRefuse, errDamaged, e.error} }

// diskStore keeps one member's files:
//
//	LOCK           held while a process runs; says which
//	boots          how often a process was started here (see kv.Batch.Boot)
//	synced         how far the log was synced, and whose it is (see synced.go)
//	removed        present once this member was removed: it never starts again
//	aside          present while this member stands aside (see aside.go)
//	damaged-<n>/   what it had before it stood aside, for a look
//	wal/           the raft log, in segments of 64 MB
//	snap/          <index, 16 hex digits>.snap.db, see kv.WriteSnapshot
type diskStore struct {
	dir    string
	id     uint64
	keep   int
	log    *zap.Logger
	lock   *fileutil.LockedFile
	wal    *wal.Log
	meta   []byte              // the log's metadata, encoded
	hard   wal.State           // as of the last save
	synced func(time.Duration) // told how long each sync of the log took; may be nil

	mark     *os.File // the file synced
	marked   syncMark // what it holds
	owner    owner    // the same: whose log it is; zero until the first load
	recorded []uint64 // snapshots that the log vouches for, oldest first

	mu struct {
		sync.Mutex
		closed bool // purge, which runs beside the loop, may come late
		sent   int  // snapshot files that are open to be sent
	}
}

// walMetadata heads every log segment: whose log it is.
type walMetadata struct {
	Version   int    `json:"v"`
	ClusterID uint64 `json:"cluster_id,string"`
	MemberID  uint64 `json:"member_id,string"`
	// Joined: this member did not found the cluster, so its log may begin
	// without a snapshot, and the first one comes from the leader.
	Joined bool `json:"joined,omitempty"`
}

// snapHeader is the opaque header of a snapshot file.
type snapHeader struct {
	Index   uint64      `json:"index"`
	Term    uint64      `json:"term"`
	Members *membership `json:"members"`
}

// openDataDir takes the directory's LOCK and clears what a crash left half
// written. It waits a moment for a predecessor that is still shutting down.
func openDataDir(dir string, id uint64, keep int, log *zap.Logger) (*diskStore, error) {
	dir = filepath.Clean(dir)
	if err := makeDir(filepath.Join(dir, "snap")); err != nil {
		return nil, fmt.Errorf("data directory: %w; choose another with --data-dir", err)
	}
	d := &diskStore{dir: dir, id: id, keep: keep, log: log}
	path := filepath.Join(dir, "LOCK")
	deadline := time.Now().Add(3 * time.Second)
	for {
		l, err := fileutil.TryLockFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil {
			d.lock = l
			break
		}
		if !errors.Is(err, fileutil.ErrLocked) {
			return nil, fmt.Errorf("data directory: %w; choose another with --data-dir", err)
		}
		if time.Now().After(deadline) {
			holder, _ := os.ReadFile(path) // only for the message
			return nil, fmt.Errorf("%w: %s is in use by %s; stop that process or choose another --data-dir", errRefuse, dir, strings.TrimSpace(string(holder)))
		}
		time.Sleep(20 * time.Millisecond)
	}
	who := fmt.Sprintf("process %d (member %d)\n", os.Getpid(), id)
	if err := errors.Join(d.lock.Truncate(0), writeAt(d.lock.File, who)); err != nil {
		return nil, errors.Join(fmt.Errorf("data directory: %w", err), d.close())
	}
	// A file that is there and cannot be read says the same as one that can.
	if reason, err := os.ReadFile(filepath.Join(dir, "removed")); err == nil {
		return nil, errors.Join(fmt.Errorf("%w: %s", errRefuse, strings.TrimSpace(string(reason))), d.close())
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%w: this member may have been removed: %w; repair the disk or choose another --data-dir", errRefuse, err), d.close())
	}
	if err := errors.Join(d.clean(), d.resumeAside()); err != nil {
		return nil, errors.Join(fmt.Errorf("data directory: %w", err), d.close())
	}
	return d, nil
}

// makeDir is os.MkdirAll for directories whose names are to survive a power loss.
func makeDir(dir string) error {
	parent := filepath.Dir(dir)
	if parent == dir {
		return nil
	}
	if _, err := os.Stat(dir); err == nil {
		return nil // bootstrap sees to the names that an earlier start made
	}
	if err := makeDir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// clean removes temporary files: a snapshot being written or received (snap's
// SaveDBFrom leaves tmp*, S2), a log being created.
func (d *diskStore) clean() error {
	// install was cut short between its two renames: the new log is complete.
	if _, err := os.Stat(filepath.Join(d.dir, "wal.old")); err == nil && !wal.Exists(d.walDir()) {
		if err := errors.Join(os.Rename(filepath.Join(d.dir, "wal.new"), d.walDir()), syncDir(d.dir)); err != nil {
			return err
		}
	}
	// What is about to go may be what a power loss would bring back under the name of
	// what took its place.
	if err := syncDir(d.dir); err != nil {
		return err
	}
	for _, pattern := range []string{"snap/*.tmp", "snap/tmp*", "wal.new", "wal.new.tmp", "wal.old", "boots.tmp", "removed.tmp", "synced.tmp", "aside.tmp"} {
		names, err := fs.Glob(os.DirFS(d.dir), pattern)
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := os.RemoveAll(filepath.Join(d.dir, n)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *diskStore) walDir() string  { return filepath.Join(d.dir, "wal") }
func (d *diskStore) snapDir() string { return filepath.Join(d.dir, "snap") }
func (d *diskStore) snapPath(index uint64) string {
	return filepath.Join(d.snapDir(), fmt.Sprintf("%016x.snap.db", index)) // the name snap.SaveDBFrom gives
}

// spareSnapshot is a file that was purged. The next snapshot is written over it:
// its blocks are allocated and its pages in memory, which makes a write of them
// four times cheaper than one of new blocks (measured), and sync need not wait for
// the file system's journal.
func (d *diskStore) spareSnapshot() string { return filepath.Join(d.snapDir(), "spare.tmp") }

// exists says whether this directory already holds a member.
func (d *diskStore) exists() bool { return holdsMember(d.dir) }

// holdsMember: a log, or one being replaced, or the word of synced that there was
// one. A member whose log is gone must not found itself anew: it has voted.
func holdsMember(dir string) bool {
	if wal.Exists(filepath.Join(dir, "wal")) || wal.Exists(filepath.Join(dir, "wal.old")) {
		return true
	}
	b, err := os.ReadFile(filepath.Join(dir, "synced"))
	if errors.Is(err, fs.ErrNotExist) || len(b) == 0 {
		return false
	}
	m, _, err := decodeSyncMark(b)
	return err != nil || m != syncMark{}
}

// quiet lets the libraries' loggers speak only of errors, and of each kind once
// in ten seconds: what they report as information is not news to an operator,
// and a peer that does not answer is reported at every attempt.
func quiet(log *zap.Logger) *zap.Logger {
	if log.Core().Enabled(zap.DebugLevel) {
		return log
	}
	return log.WithOptions(zap.IncreaseLevel(zap.ErrorLevel), zap.WrapCore(func(c zapcore.Core) zapcore.Core {
		return zapcore.NewSamplerWithOptions(c, 10*time.Second, 1, 0)
	}))
}

// bootstrap writes the first files of a member, so that a crash at any point
// leaves either nothing or all of it.
//
// A founder begins with a snapshot at index 1 that holds the member table,
// instead of with faked log entries: starting and restarting are then one
// path, and every later member gets the table the same way. A joiner begins
// empty.
func (d *diskStore) bootstrap(id uint64, m *membership, joined bool) error {
	meta := walMetadata{Version: 1, ClusterID: m.ClusterID, MemberID: id, Joined: joined}
	// From here on boots has to be there.
	err := syncDir(filepath.Dir(d.dir))
	if _, missing := os.Stat(filepath.Join(d.dir, "boots")); missing != nil {
		err = errors.Join(err, writeFileSync(filepath.Join(d.dir, "boots"), seal("0")))
	}
	if err != nil {
		return fmt.Errorf("%w: create log: %w", errDurability, err)
	}
	return d.createLog(meta, func(l *wal.Log) error {
		if joined {
			return nil
		}
		state := kv.NewState()
		state.SetApplied(1)
		if _, err := d.writeSnapshot(snapHeader{Index: 1, Term: 1, Members: m}, state); err != nil {
			return err
		}
		l.Snapshot(1, 1)
		l.State(wal.State{Term: 1, Commit: 1})
		return l.Sync()
	})
}

// createLog puts a log in place that begins with what fill writes, or nothing.
func (d *diskStore) createLog(meta walMetadata, fill func(*wal.Log) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: create log: %w", errDurability, err)
		}
	}()
	b, err := json.Marshal(meta)
	if err != nil {
		return err
	}
	tmp := filepath.Join(d.dir, "wal.new")
	l, err := wal.Create(tmp, b, 0, d.walOptions())
	if err != nil {
		return err
	}
	if err := errors.Join(fill(l), l.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(tmp, d.walDir()), syncDir(d.dir))
}

func second[T any](_ T, err error) error { return err }

func (d *diskStore) walOptions() wal.Options {
	return wal.Options{SegmentBytes: segmentBytes, Synced: d.synced}
}

// segmentBytes is the size of a segment of the log. Tests make it smaller.
var segmentBytes int64 = 64 << 20

func (d *diskStore) readSnapshot(index uint64) (snapHeader, *kv.State, error) {
	var h snapHeader
	path := d.snapPath(index)
	f, err := os.Open(path)
	if err != nil {
		return h, nil, err
	}
	defer f.Close()
	b, state, err := kv.ReadSnapshot(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return h, nil, fmt.Errorf("%s: %w", path, err)
	}
	if h, err = decodeSnapHeader(b); err != nil {
		return h, nil, fmt.Errorf("%s: %w", path, err)
	}
	if state.Applied() != h.Index {
		return h, nil, fmt.Errorf("%s: the state is of entry %d, the header says %d", path, state.Applied(), h.Index)
	}
	return h, state, nil
}

// snapFile is a snapshot file open for sending.
type snapFile struct {
	io.ReadCloser
	size int64
}

func (d *diskStore) openSnapshot(index uint64) (snapFile, error) {
	d.mu.Lock() // a purge may make another file of this one
	defer d.mu.Unlock()
	f, err := os.Open(d.snapPath(index))
	if err != nil {
		return snapFile{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return snapFile{}, errors.Join(err, f.Close())
	}
	d.mu.sent++
	return snapFile{sentFile{f, sync.OnceValue(func() error {
		d.mu.Lock()
		d.mu.sent--
		d.mu.Unlock()
		return f.Close()
	})}, info.Size()}, nil
}

// sentFile is closed twice: by net/http, and by rafthttp, which takes an error for a
// snapshot that did not arrive.
type sentFile struct {
	*os.File
	close func() error
}

func (f sentFile) Close() error { return f.close() }

// snapshotHeader reads who and when of a snapshot file that was verified before.
func (d *diskStore) snapshotHeader(index uint64) (snapHeader, error) {
	f, err := os.Open(d.snapPath(index))
	if err != nil {
		return snapHeader{}, err
	}
	defer f.Close()
	b, err := kv.ReadSnapshotHeader(f)
	if err != nil {
		return snapHeader{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return decodeSnapHeader(b)
}

func decodeSnapHeader(b []byte) (snapHeader, error) {
	var h snapHeader
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("snapshot header: %w", err)
	}
	if h.Index == 0 || h.Term == 0 {
		return h, errors.New("snapshot header: index or term is missing")
	}
	if err := h.Members.check(); err != nil {
		return h, fmt.Errorf("snapshot header: %w", err)
	}
	return h, nil
}

// verifySnapshot reads a whole snapshot file in constant memory.
func (d *diskStore) verifySnapshot(index uint64) (snapHeader, error) {
	path := d.snapPath(index)
	f, err := os.Open(path)
	if err != nil {
		return snapHeader{}, err
	}
	defer f.Close()
	b, err := kv.VerifySnapshot(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		return snapHeader{}, fmt.Errorf("%s: %w", path, err)
	}
	h, err := decodeSnapHeader(b)
	if err == nil && h.Index != index {
		err = fmt.Errorf("%s: holds entry %d", path, h.Index)
	}
	return h, err
}

// writeSnapshot streams state into its file and returns the size: temporary
// name, sync, rename, sync of the directory. The caller owns state, which
// nobody may be changing.
func (d *diskStore) writeSnapshot(h snapHeader, state *kv.State) (size int64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: write snapshot %d: %w", errDurability, h.Index, err)
		}
	}()
	head, err := json.Marshal(h)
	if err != nil {
		return 0, err
	}
	path := d.snapPath(h.Index)
	if err := os.Rename(d.spareSnapshot(), path+".tmp"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return 0, err
	}
	w := &syncWriter{f: f}
	b := bufio.NewWriterSize(w, 256<<10)
	err = errors.Join(kv.WriteSnapshot(b, head, state), b.Flush())
	if err = errors.Join(err, f.Truncate(w.written), f.Sync(), f.Close()); err != nil {
		return 0, errors.Join(err, os.Remove(path+".tmp"))
	}
	if err = os.Rename(path+".tmp", path); err != nil {
		return 0, errors.Join(err, os.Remove(path+".tmp"))
	}
	return w.written, syncDir(d.snapDir())
}

// noRoom says that a write failed for lack of space and for nothing worse.
func noRoom(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// syncWriter pushes dirty pages out as it goes: one large sync at the end
// would hold up the log's own syncs on the same disk.
type syncWriter struct {
	f                *os.File
	written, unsaved int64
}

const syncEvery = 4 << 20

func (w *syncWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	w.written += int64(n)
	if w.unsaved += int64(n); err == nil && w.unsaved >= syncEvery {
		w.unsaved = 0
		err = fileutil.Fdatasync(w.f)
	}
	return n, err
}

func (d *diskStore) save(hs *raftpb.HardState, ents []*raftpb.Entry) error {
	before := d.hard
	d.addToLog(hs, ents)
	promises := d.hard.Term != before.Term || d.hard.Vote != before.Vote
	if !promises && len(ents) == 0 {
		return nil // the commit index may be lost, and is found again
	}
	return d.syncLog(promises)
}

// syncLog makes what was added to the log durable, and then notes that it is: a mark
// that tells of what the log does not hold makes damage of the next start.
func (d *diskStore) syncLog(promises bool) error {
	err := d.wal.Sync()
	if err == nil {
		err = d.setMark(syncMark{d.wal.Frames(), d.hard.Term}, promises)
	}
	if err != nil {
		return fmt.Errorf("%w: write log: %w", errDurability, err)
	}
	return nil
}

func (d *diskStore) addToLog(hs *raftpb.HardState, ents []*raftpb.Entry) {
	if !raft.IsEmptyHardState(hs) {
		d.hard = wal.State{Term: hs.GetTerm(), Vote: hs.GetVote(), Commit: hs.GetCommit()}
		d.wal.State(d.hard)
	}
	for _, e := range ents {
		d.wal.Entry(uint8(e.GetType()), e.GetTerm(), e.GetIndex(), e.GetData())
	}
}

func (d *diskStore) saveSnapshot(m *raftpb.SnapshotMetadata) error {
	d.wal.Snapshot(m.GetIndex(), m.GetTerm())
	if err := d.syncLog(false); err != nil {
		return err
	}
	d.recorded = append(d.recorded, m.GetIndex())
	return nil
}

// install swaps the log for a new one: built beside it, complete and synced,
// then renamed into its place. Entries of the old log beyond the snapshot would
// come back at a restart, with terms that belong to a history which never was
// committed.
func (d *diskStore) install(m *raftpb.SnapshotMetadata, hs *raftpb.HardState, ents []*raftpb.Entry) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: begin a new log after snapshot %d: %w", errDurability, m.GetIndex(), err)
		}
	}()
	fresh, old := filepath.Join(d.dir, "wal.new"), filepath.Join(d.dir, "wal.old")
	before := d.wal
	if err := before.Close(); err != nil {
		return err
	}
	// It counts on from the old log, so that synced is never ahead of either.
	if d.wal, err = wal.Create(fresh, d.meta, before.Frames(), d.walOptions()); err != nil {
		return err
	}
	d.wal.Snapshot(m.GetIndex(), m.GetTerm())
	d.addToLog(hs, ents)
	// The new log has its name on disk before the old one loses its own.
	if err := errors.Join(d.wal.Sync(), d.wal.Close(), syncDir(d.dir)); err != nil {
		return err
	}
	if err := errors.Join(os.Rename(d.walDir(), old), os.Rename(fresh, d.walDir()), syncDir(d.dir)); err != nil {
		return err
	}
	c, err := wal.Read(d.walDir(), wal.Visitor{})
	if err != nil {
		return err
	}
	if d.wal, err = wal.Open(d.walDir(), c, d.walOptions()); err != nil {
		return err
	}
	d.recorded = []uint64{m.GetIndex()}
	return errors.Join(d.setMark(syncMark{c.Frames, c.State.Term}, true), os.RemoveAll(old))
}

func (d *diskStore) release(index uint64) error {
	if err := d.wal.Release(index); err != nil {
		return fmt.Errorf("%w: release log: %w", errDurability, err)
	}
	return nil
}

// snapshotFiles are the indexes of the snapshot files, oldest first.
func (d *diskStore) snapshotFiles() ([]uint64, error) {
	names, err := os.ReadDir(d.snapDir())
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, n := range names {
		if hex, ok := strings.CutSuffix(n.Name(), ".snap.db"); ok && len(hex) == 16 {
			if i, err := strconv.ParseUint(hex, 16, 64); err == nil {
				out = append(out, i)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// forgetSnapshot says that a file which the log vouches for is damaged: a purge
// must not count it. It returns the newest of the others, 0: none.
func (d *diskStore) forgetSnapshot(index uint64) (newest uint64) {
	d.recorded = slices.DeleteFunc(d.recorded, func(i uint64) bool { return i == index })
	if len(d.recorded) > 0 {
		newest = slices.Max(d.recorded)
	}
	return newest
}

// oldestKept is the oldest snapshot that survives a purge; 0 if nothing is to go.
// Only those count that the log vouches for: no member starts from another.
func (d *diskStore) oldestKept() uint64 {
	if len(d.recorded) <= d.keep {
		return 0
	}
	d.recorded = slices.Clone(d.recorded[len(d.recorded)-d.keep:])
	return d.recorded[0]
}

// purge takes away the snapshots before oldest. It runs beside the raft loop.
func (d *diskStore) purge(oldest uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.closed {
		return nil // another process may own the directory by now
	}
	files, err := d.snapshotFiles()
	if err != nil {
		return err
	}
	for _, i := range files {
		switch {
		case i >= oldest:
		case d.mu.sent > 0: // it may be this one, and must not be written over
			err = errors.Join(err, os.Remove(d.snapPath(i)))
		default:
			err = errors.Join(err, os.Rename(d.snapPath(i), d.spareSnapshot()))
		}
	}
	return err
}

// sizes are the bytes of the log segments (they are allocated ahead) and of
// the snapshots.
func (d *diskStore) sizes() (walBytes, snapBytes int64) {
	sum := func(dir string) (n int64) {
		names, err := os.ReadDir(dir)
		if err != nil {
			return 0
		}
		for _, e := range names {
			if info, err := e.Info(); err == nil {
				n += info.Size()
			}
		}
		return n
	}
	return sum(d.walDir()), sum(d.snapDir())
}

// freeBytes is what the file system would still give this process.
func (d *diskStore) freeBytes() (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

func (d *diskStore) close() error {
	d.mu.Lock()
	d.mu.closed = true
	d.mu.Unlock()
	var err error
	if d.wal != nil {
		err = d.wal.Close()
	}
	if d.mark != nil {
		err = errors.Join(err, d.mark.Close())
	}
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}
